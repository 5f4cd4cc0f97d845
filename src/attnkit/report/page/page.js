// Draws every chart in the colours of the page, again when those or the room change, and follows one row through all.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const holders = [...document.querySelectorAll("[data-figure]")];
  const buttons = [...document.querySelectorAll(".keys button")];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let drawn = [];
  let pinned = "";
  let turn = 0;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function theme() {
    const [ink, soft, line, grid] = ["ink", "soft", "line", "grid"].map(colour);
    const rows = [];
    while (colour(`row-${rows.length}`)) rows.push(colour(`row-${rows.length}`));
    return {
      font: getComputedStyle(document.body).fontFamily,
      range: { category: rows },
      view: { stroke: null },
      axis: {
        domainColor: line, tickColor: line, gridColor: grid, labelColor: soft, titleColor: soft,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400, titlePadding: 8, labelPadding: 4, labelOverlap: true,
      },
      axisX: { grid: false },
      style: {
        name: { color: ink, fontSize: 12 },
        ours: { color: colour("ours") },
        theirs: { color: colour("theirs") },
        floor: { color: colour("floor") },
        limit: { color: colour("limit"), strokeDash: [4, 3], strokeWidth: 1.5 },
      },
    };
  }

  const narrow = (holder) => holder.clientWidth < 440;

  async function draw(holder, mine) {
    const { spec } = figures[holder.dataset.figure];
    const tight = narrow(holder);
    const params = spec.params.map((p) => (p.name === "narrow" ? { ...p, value: tight } : p));
    const options = { actions: false, renderer: "svg", mode: "vega-lite", config: theme() };
    const { view, finalize } = await window.vegaEmbed(holder, { ...spec, params }, options);
    if (mine !== turn) return finalize();
    view.addEventListener("pointerover", (_, item) => choose(item?.datum?.row || pinned));
    view.addEventListener("pointerout", () => choose(pinned));
    drawn.push({ view, finalize, holder, tight });
  }

  async function drawAll() {
    const mine = ++turn;
    for (const { finalize } of drawn.splice(0)) finalize();
    for (const holder of holders) await draw(holder, mine);
    if (mine === turn) document.documentElement.dataset.drawn = String(drawn.length);
  }

  function choose(row) {
    for (const { view } of drawn) view.signal("chosen", row).runAsync();
  }

  for (const button of buttons) {
    const row = button.dataset.row;
    button.addEventListener("click", () => {
      pinned = pinned === row ? "" : row;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other.dataset.row === pinned));
      choose(pinned);
    });
    button.addEventListener("pointerenter", () => choose(row));
    button.addEventListener("pointerleave", () => choose(pinned));
  }

  dark.addEventListener("change", drawAll);
  window.addEventListener("resize", () => {
    if (drawn.some(({ holder, tight }) => narrow(holder) !== tight)) drawAll();
  });
  drawAll();
})();
