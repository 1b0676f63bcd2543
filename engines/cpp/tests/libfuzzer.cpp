// The libFuzzer entry point for the target HIGEN_FUZZ_TARGET, which the build sets.
#include "fuzz_targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::HIGEN_FUZZ_TARGET(data, size);
    return 0;
}
