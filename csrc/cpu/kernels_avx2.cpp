#define STBP_ISA avx2
#include "kernels_impl.h"
