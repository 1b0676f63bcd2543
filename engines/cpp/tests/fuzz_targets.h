// Fuzz targets without a model's graphs: any bytes must give a result or a typed error. libFuzzer and fuzz_corpus use
// them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuzz {

void manifest(const std::uint8_t* data, std::size_t size);
void sealed_manifest(const std::uint8_t* data, std::size_t size);
void record(const std::uint8_t* data, std::size_t size);
void tokenizer(const std::uint8_t* data, std::size_t size);
void text(const std::uint8_t* data, std::size_t size);

}  // namespace fuzz
