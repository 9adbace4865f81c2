// What each device's code tells about itself, for stbp_cuda.build_info().
#pragma once

#include <cstdint>

namespace stbp {

const char* cpu_instruction_set();  // chosen on this machine
int cpu_chunk();                    // K of "one state every K steps"
int cpu_neunorm_chunk();            // the same for neurons with normalisation

#if defined(STBP_CUDA)
int cuda_chunk();
int cuda_neunorm_chunk();
#endif

}  // namespace stbp
