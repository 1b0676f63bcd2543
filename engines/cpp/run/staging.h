// A folder for a file that is not finished, by the rules of higen/staging.py: killed writers' folders are known by their
// name, note and free lock, and are removed by the next writer in the same place, this one or Python's.
#pragma once

#include <filesystem>

class Staging {
public:
    // Made in `parent`, where what killed writers left is removed. Throws std::filesystem::filesystem_error.
    explicit Staging(const std::filesystem::path& parent);
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    // Empty, to be filled.
    [[nodiscard]] std::filesystem::path folder() const { return root_ / "new"; }

private:
    std::filesystem::path root_;
    int lock_ = -1;
};
