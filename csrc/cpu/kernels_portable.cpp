#define STBP_ISA portable
#include "kernels_impl.h"
