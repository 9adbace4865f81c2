#define STBP_ISA avx512
#include "kernels_impl.h"
