// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace higen::core {

class Sha256 {
public:
    void update(const void* data, std::size_t size);
    // The digest in lower-case hexadecimal. Add nothing afterwards.
    [[nodiscard]] std::string hex();

private:
    void block(const std::uint8_t* data);

    std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                           0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<std::uint8_t, 64> rest_{};
    std::uint64_t size_ = 0;
};

// The digest of a file in hexadecimal. Throws an integrity error if the file cannot be read.
[[nodiscard]] std::string sha256(const std::filesystem::path& path);

}  // namespace higen::core
