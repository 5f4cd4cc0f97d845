#define ATTNKIT_LEVEL v4bf16
#include "kernels.h"
