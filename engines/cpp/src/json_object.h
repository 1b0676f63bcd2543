// Reads JSON objects with known keys and types (higen/typed_json.py). Throws manifest errors that name the place.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"

namespace higen::core {

using Json = nlohmann::json;

// A value for a message: on one line, and shortened. For nested values only the kind is named, because nlohmann's dump
// is recursive and a manifest may be nested to any depth.
[[nodiscard]] inline std::string shown(const Json& value) {
    if (value.is_structured()) return value.type_name();
    auto text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    return text;
}

// Reads the keys of one object. A key that was not asked for is an error.
class Object {
public:
    Object(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
        if (!json_.is_object()) fail_manifest(where_ + ": an object is wanted, not " + shown(json_));
    }

    // Calls `read` with the value if the key exists.
    void key(const char* name, const std::function<void(const Json&, const std::string&)>& read) {
        known_.emplace_back(name);
        if (const auto found = json_.find(name); found != json_.end()) read(*found, where_ + "." + name);
    }

    template <typename T>
    void value(const char* name, T& value) {
        key(name, [&](const Json& json, const std::string& where) { take(json, where, value); });
    }

    // The same for a required key.
    void required(const char* name, const std::function<void(const Json&, const std::string&)>& read) {
        if (json_.find(name) == json_.end()) fail_manifest(where_ + "." + name + ": is missing");
        key(name, read);
    }

    template <typename T>
    void required_value(const char* name, T& value) {
        required(name, [&](const Json& json, const std::string& where) { take(json, where, value); });
    }

    void finish() const {
        for (const auto& item : json_.items())
            if (std::find(known_.begin(), known_.end(), item.key()) == known_.end())
                fail_manifest(where_ + "." + shown(item.key()) + ": unknown key");
    }

    static void take(const Json& json, const std::string& where, std::int64_t& value) {
        const bool fits = json.is_number_integer() &&
                          (!json.is_number_unsigned() ||
                           json.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()});
        if (!fits) wrong(json, where, "a whole number is wanted");
        value = json.get<std::int64_t>();
    }
    static void take(const Json& json, const std::string& where, std::uintmax_t& value) {
        if (!json.is_number_unsigned()) wrong(json, where, "a whole number, 0 or more, is wanted");
        value = json.get<std::uintmax_t>();
    }
    static void take(const Json& json, const std::string& where, double& value) {
        if (!json.is_number() || !std::isfinite(json.get<double>())) wrong(json, where, "a number is wanted");
        value = json.get<double>();
    }
    static void take(const Json& json, const std::string& where, bool& value) {
        if (!json.is_boolean()) wrong(json, where, "true or false is wanted");
        value = json.get<bool>();
    }
    static void take(const Json& json, const std::string& where, std::string& value) {
        if (!json.is_string()) wrong(json, where, "a text is wanted");
        value = json.get<std::string>();
    }
    template <typename T>
    static void take(const Json& json, const std::string& where, std::optional<T>& value) {
        value.reset();
        if (!json.is_null()) take(json, where, value.emplace());
    }
    template <typename T>
    static void take(const Json& json, const std::string& where, std::vector<T>& values) {
        if (!json.is_array()) wrong(json, where, "a list is wanted");
        values.clear();
        for (const auto& item : json) {
            T value{};
            take(item, where + "[" + std::to_string(values.size()) + "]", value);
            values.push_back(value);
        }
    }
    template <typename T>
    static void take(const Json& json, const std::string& where, std::array<T, 2>& values) {
        if (!json.is_array() || json.size() != 2) wrong(json, where, "a list of two is wanted");
        for (std::size_t i = 0; i < 2; ++i) take(json[i], where + "[" + std::to_string(i) + "]", values[i]);
    }

private:
    [[noreturn]] static void wrong(const Json& json, const std::string& where, const char* wanted) {
        fail_manifest(where + "=" + shown(json) + ": " + wanted);
    }

    const Json& json_;
    std::string where_;
    std::vector<std::string> known_;
};

}  // namespace higen::core
