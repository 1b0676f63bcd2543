// A libFuzzer entry point for the target that the build names.
#include "fuzz_targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::HIGEN_FUZZ_TARGET(data, size);
    return 0;
}
