// A folder for an unfinished file, by the rules of higen/staging.py. The next writer in the same place, this one or
// Python's, removes the folders of killed writers. It recognises them by their name, note and free lock.
#pragma once

#include <filesystem>

class Staging {
public:
    // Makes the folder in `parent` and removes folders that killed writers left there. Throws
    // std::filesystem::filesystem_error.
    explicit Staging(const std::filesystem::path& parent);
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    // An empty folder for the caller's files.
    [[nodiscard]] std::filesystem::path folder() const { return root_ / "new"; }

private:
    std::filesystem::path root_;
    int lock_ = -1;
};
