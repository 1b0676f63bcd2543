// Shared by the parts of the C interface: handles, and the conversion of exceptions to a status.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "handles.h"
#include "higen/higen.h"

namespace higen::c_api {

inline std::string& last_error() {
    thread_local std::string message;
    return message;
}

template <typename Work>
higen_status guarded(const Work& work) noexcept {
    try {
        last_error().clear();
        try {
            work();
            return HIGEN_OK;
        } catch (const core::Error& error) {
            last_error() = error.what();
            return error.status();
        } catch (const std::bad_alloc&) {
            last_error() = "out of memory";
            return HIGEN_ERROR_MEMORY;
        } catch (const std::length_error&) {
            last_error() = "out of memory: an array would be larger than this machine can address";
            return HIGEN_ERROR_MEMORY;
        } catch (const std::exception& error) {
            last_error() = std::string("an error of this library: ") + error.what();
            return HIGEN_ERROR_INTERNAL;
        }
    } catch (...) {  // no memory even for the message
        return HIGEN_ERROR_MEMORY;
    }
}

// For functions that free. A static object's destructor may call them when the thread's message no longer exists.
template <typename Work>
void quietly(const Work& work) noexcept {
    try {
        work();
    } catch (const std::exception&) {  // the lock failed: nothing is freed
    }
}

inline void require(const void* pointer, const char* name) {
    if (pointer == nullptr) core::fail_request(std::string(name) + " is NULL");
}

// A caller's structure in this version's layout. The caller's may be of an older version and smaller.
template <typename T>
T sized(const T* given, const char* name, T standard) {
    if (given == nullptr) return standard;
    const std::size_t size = given->struct_size;
    if (size < sizeof(std::size_t) || size > (1U << 20))
        core::fail_request(std::string(name) + ".struct_size=" + std::to_string(size) +
                           ": initialise the structure with its macro or function");
    std::memcpy(&standard, given, std::min(size, sizeof(T)));
    return standard;
}

template <typename T>
void store(const T& value, T* out, const char* name) {
    const std::size_t size = out->struct_size;
    if (size < sizeof(std::size_t)) core::fail_request(std::string(name) + ".struct_size is not set");
    std::memcpy(out, &value, std::min(size, sizeof(T)));
    out->struct_size = size;
}

inline int narrow(std::int64_t value) {
    return static_cast<int>(std::clamp<std::int64_t>(value, INT32_MIN, INT32_MAX));
}

inline int narrow(std::size_t value) {
    return narrow(static_cast<std::int64_t>(std::min<std::size_t>(value, INT32_MAX)));
}

}  // namespace higen::c_api
