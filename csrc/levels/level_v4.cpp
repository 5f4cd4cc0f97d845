#define ATTNKIT_LEVEL v4
#include "kernels.h"
