#define ATTNKIT_LEVEL generic
#include "kernels.h"
