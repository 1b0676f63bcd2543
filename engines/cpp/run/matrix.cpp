#include "matrix.h"

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace {

constexpr std::uintmax_t largest = std::uintmax_t{1} << 28;

[[noreturn]] void fail(const std::string& path, const std::string& what) { throw std::runtime_error(path + ": " + what); }

std::string read(const std::string& path) {
    std::error_code error;
    const auto place = std::filesystem::u8path(path);
    if (!std::filesystem::is_regular_file(place, error)) fail(path, error ? error.message() : "is not a regular file");
    if (std::filesystem::file_size(place, error) > largest) fail(path, "is too large for a matrix");
    std::ifstream file(place, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) fail(path, "cannot be read");
    return text;
}

template <typename Number>
void take(const std::string& data, std::size_t at, std::vector<double>& numbers) {
    for (auto& number : numbers) {
        Number value;
        std::memcpy(&value, data.data() + at, sizeof value);
        number = static_cast<double>(value);
        at += sizeof value;
    }
}

// numpy.lib.format: magic, version, length of the header, a dictionary, numbers. Little-endian, like this machine.
Matrix from_npy(const std::string& path, const std::string& data) {
    const std::string wanted = "a .npy file with float32, float64, int32 or int64 of two axes, row by row, is wanted";
    const std::size_t start = data.size() > 6 && data[6] == 1 ? 10 : 12;
    if (data.size() < start) fail(path, wanted);
    std::size_t length = 0;
    for (std::size_t i = start; i > 8; --i) length = length << 8 | static_cast<unsigned char>(data[i - 1]);
    if (length > 4096 || length > data.size() - start) fail(path, wanted);
    const auto header = data.substr(start, length);
    const std::string before_type = "'descr': '<";
    const auto type_at = header.find(before_type), shape_at = header.find("'shape': (");
    const auto type = type_at == std::string::npos ? "" : header.substr(type_at + before_type.size(), 2);
    Matrix matrix;
    const bool known = (type == "f4" || type == "f8" || type == "i4" || type == "i8") &&
                       header.find("'fortran_order': False") != std::string::npos && shape_at != std::string::npos &&
                       std::sscanf(header.c_str() + shape_at, "'shape': (%6zu, %6zu)", &matrix.rows, &matrix.columns) == 2;
    if (!known) fail(path, wanted);
    const auto count = matrix.rows * matrix.columns;
    if (data.size() - start - length != count * (type[1] == '4' ? 4 : 8)) fail(path, "is truncated");
    matrix.numbers.resize(count);
    const auto at = start + length;
    if (type == "f4") take<float>(data, at, matrix.numbers);
    if (type == "f8") take<double>(data, at, matrix.numbers);
    if (type == "i4") take<std::int32_t>(data, at, matrix.numbers);
    if (type == "i8") take<std::int64_t>(data, at, matrix.numbers);
    return matrix;
}

Matrix from_text(const std::string& path, std::string text) {
    if (text.compare(0, 3, "\xef\xbb\xbf") == 0) text.erase(0, 3);
    Matrix matrix;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
        const auto before = matrix.numbers.size();
        const auto* at = line.data();
        const auto* end = at + line.size();
        for (const auto is_between = [](char c) { return c == ',' || c == ' ' || c == '\t' || c == '\r'; }; at < end;) {
            if (is_between(*at)) {
                ++at;
                continue;
            }
            double number = 0;
            const auto [rest, error] = std::from_chars(at, end, number);
            if (error != std::errc() || (rest < end && !is_between(*rest)))
                fail(path, "line " + std::to_string(matrix.rows + 1) +
                               ": numbers separated by commas or spaces are wanted");
            matrix.numbers.push_back(number);
            at = rest;
        }
        const auto columns = matrix.numbers.size() - before;
        if (columns == 0) continue;  // an empty line
        if (matrix.rows > 0 && columns != matrix.columns)
            fail(path, "has rows of " + std::to_string(matrix.columns) + " and of " + std::to_string(columns) + " numbers");
        matrix.columns = columns;
        ++matrix.rows;
    }
    return matrix;
}

}  // namespace

Matrix read_matrix(const std::string& path) {
    const auto data = read(path);
    auto matrix = data.compare(0, 6, "\x93NUMPY") == 0 ? from_npy(path, data) : from_text(path, data);
    if (matrix.numbers.empty()) fail(path, "has no numbers");
    return matrix;
}
