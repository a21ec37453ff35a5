// The C++ kernels of every instruction set: right values, and z the same bits from all of them and from CUDA's source.
#include "decode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vaeops::test::check_cpu(vaeops::test::decode(data, size));
  if (vaeops::test::failures > 0) std::abort();
  return 0;
}
