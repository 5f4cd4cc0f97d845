#define ATTNKIT_LEVEL v2
#include "kernels.h"
