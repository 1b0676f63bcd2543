// A minimal test framework for these tests.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"

namespace test {

inline int failures = 0;

inline std::vector<std::pair<std::string, std::function<void()>>>& cases() {
    static std::vector<std::pair<std::string, std::function<void()>>> all;
    return all;
}

struct Case {
    Case(std::string name, std::function<void()> body) { cases().emplace_back(std::move(name), std::move(body)); }
};

inline void report(bool good, const char* file, int line, const std::string& what) {
    if (good) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

// The status and message that `work` fails with; HIGEN_OK if it does not fail.
inline std::pair<higen_status, std::string> failure(const std::function<void()>& work) {
    try {
        work();
        return {HIGEN_OK, ""};
    } catch (const higen::core::Error& error) {
        return {error.status(), error.what()};
    }
}

inline int run_all() {
    for (const auto& [name, body] : cases()) {
        const int before = failures;
        try {
            body();
        } catch (const std::exception& error) {
            report(false, name.c_str(), 0, std::string("threw ") + error.what());
        }
        std::printf("%s %s\n", failures == before ? "passed" : "FAILED", name.c_str());
    }
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace test

#define TEST(name)                                          \
    static void name();                                     \
    static const test::Case name##_case{#name, name};       \
    static void name()
#define CHECK(condition) test::report((condition), __FILE__, __LINE__, #condition)
// Check that `work` fails with this status and that its message contains `words`.
#define CHECK_FAILS(status, words, work)                                                               \
    do {                                                                                               \
        const auto [found, message] = test::failure([&] { (void)(work); });                            \
        test::report(found == (status) && message.find(words) != std::string::npos, __FILE__, __LINE__, \
                     std::string(#work) + ": " + higen_status_name(found) + ": " + message);           \
    } while (false)
