// What the parts of the C interface share: the model, and the way from an exception to a status.
#pragma once

#include <algorithm>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "bundle.h"
#include "errors.h"
#include "higen/higen.h"
#include "pipeline.h"
#include "router.h"
#include "tokenizer.h"

struct higen_model {
    higen::core::Bundle bundle;
    std::optional<higen::core::Tokenizer> tokenizer;  // none where the model reads no text
    std::unique_ptr<higen::core::Router> router;
    higen::core::Pipeline pipeline;
    mutable std::mutex mutex;
    mutable std::set<std::string> reports;  // those handed out
    std::list<higen::core::Cancellation*> running;
    std::vector<std::vector<const char*>> solvers, choices;  // of each loop and control, for the C interface

    higen_model(const std::filesystem::path& path, const higen::core::BackendOptions& options)
        : bundle(path, options.verify),
          router(higen::core::make_router(bundle, options)),
          pipeline(bundle.manifest(), *router) {
        if (const auto& text = manifest().text)
            tokenizer.emplace(higen::core::read_file(bundle.file(text->tokenizer)),
                              (path / std::filesystem::u8path(text->tokenizer)).u8string(), *text);
        for (const auto& loop : manifest().loops) {
            auto& names = solvers.emplace_back();
            for (const auto& solver : loop.solvers) names.push_back(solver.name.c_str());
        }
        for (const auto& control : manifest().controls) {
            auto& texts = choices.emplace_back();
            for (const auto& choice : control.choices) texts.push_back(choice.c_str());
        }
        pipeline.prepare();
    }

    [[nodiscard]] const higen::core::Manifest& manifest() const { return bundle.manifest(); }
    [[nodiscard]] const higen::core::Tokenizer* reader() const { return tokenizer ? &*tokenizer : nullptr; }

    // What runs each stage by now; the text lives as long as the model.
    [[nodiscard]] const char* report() const {
        const std::lock_guard lock(mutex);
        return reports.insert(router->report()).first->c_str();
    }
};

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
    } catch (...) {  // no memory for the message either
        return HIGEN_ERROR_MEMORY;
    }
}

inline void require(const void* pointer, const char* name) {
    if (pointer == nullptr) core::fail_request(std::string(name) + " is NULL");
}

// A caller's structure in this version's layout; it may be an older, smaller one.
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
