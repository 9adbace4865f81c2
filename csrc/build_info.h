// What each device's code tells about itself, for stbp_cuda.build_info().
#pragma once

namespace stbp {

const char* cpu_instruction_set();  // chosen on this machine
int cpu_chunk();                    // K of "one state every K steps"

#if defined(STBP_CUDA)
int cuda_chunk();
#endif

}  // namespace stbp
