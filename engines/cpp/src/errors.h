// Errors inside the library. They are exceptions here, and become a status at the C interface.
#pragma once

#include <stdexcept>
#include <string>

#include "higen/higen.h"

namespace higen::core {

class Error : public std::runtime_error {
public:
    Error(higen_status status, const std::string& message) : std::runtime_error(message), status_(status) {}

    [[nodiscard]] higen_status status() const noexcept { return status_; }

private:
    higen_status status_;
};

[[noreturn]] inline void fail_request(const std::string& message) { throw Error(HIGEN_ERROR_REQUEST, message); }
[[noreturn]] inline void fail_manifest(const std::string& message) { throw Error(HIGEN_ERROR_MANIFEST, message); }
[[noreturn]] inline void fail_integrity(const std::string& message) { throw Error(HIGEN_ERROR_INTEGRITY, message); }
[[noreturn]] inline void fail_backend(const std::string& message) { throw Error(HIGEN_ERROR_BACKEND, message); }
[[noreturn]] inline void fail_unavailable(const std::string& message) { throw Error(HIGEN_ERROR_UNAVAILABLE, message); }

}  // namespace higen::core
