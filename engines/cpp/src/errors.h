// Errors inside the library are exceptions; the C interface turns them into a status.
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

// Why an engine of TensorRT cannot be used. `what` begins with the kind's name, which is the name of Python's error.
class EngineError : public Error {
public:
    enum class Kind {
        malformed,
        stale,
        wrong_architecture,
        missing_library,
        no_driver,
        no_device,
        outside_profile,
        other
    };

    EngineError(Kind kind, const std::string& message)
        : Error(status_of(kind), std::string(name(kind)) + ": " + message), kind_(kind) {}

    [[nodiscard]] Kind kind() const noexcept { return kind_; }

    [[nodiscard]] static const char* name(Kind kind) noexcept {
        switch (kind) {
            case Kind::malformed: return "Malformed";
            case Kind::stale: return "Stale";
            case Kind::wrong_architecture: return "WrongArchitecture";
            case Kind::missing_library: return "MissingLibrary";
            case Kind::no_driver: return "NoDriver";
            case Kind::no_device: return "NoDevice";
            case Kind::outside_profile: return "OutsideProfile";
            case Kind::other: break;
        }
        return "EngineError";
    }

private:
    static higen_status status_of(Kind kind) noexcept {
        if (kind == Kind::malformed) return HIGEN_ERROR_INTEGRITY;
        return kind == Kind::other ? HIGEN_ERROR_BACKEND : HIGEN_ERROR_UNAVAILABLE;
    }

    Kind kind_;
};

}  // namespace higen::core
