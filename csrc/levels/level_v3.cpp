#define ATTNKIT_LEVEL v3
#include "kernels.h"
