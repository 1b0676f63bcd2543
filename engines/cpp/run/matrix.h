// Reads matrices from files, for controls that take one.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

struct Matrix {
    std::vector<double> numbers;  // row by row
    std::size_t rows = 0;
    std::size_t columns = 0;
};

// Reads a file: .npy (float32, float64, int32 or int64, with two axes), or text with one row per line and commas or
// blanks between the numbers. Throws std::runtime_error whose message begins with the path.
[[nodiscard]] Matrix read_matrix(const std::string& path);
