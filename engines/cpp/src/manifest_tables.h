// Reads the rows of the manifest's tables. All keys are required, unknown keys refused, and each row checked by itself.
#pragma once

#include "json_object.h"
#include "manifest.h"

namespace higen::core {

// Throws a manifest error with `message` if `good` is false.
inline void check_manifest(bool good, const std::string& message) {
    if (!good) fail_manifest(message);
}

// Calls `read` with each item of a list.
template <typename T>
void take_rows(Object& object, const char* key, std::vector<T>& rows,
               void (*read)(const Json&, const std::string&, T&)) {
    object.required(key, [&](const Json& value, const std::string& where) {
        if (!value.is_array()) fail_manifest(where + "=" + shown(value) + ": a list is wanted");
        rows.clear();
        for (const auto& item : value) {
            const auto place = where + "[" + std::to_string(rows.size()) + "]";
            read(item, place, rows.emplace_back());
        }
    });
}

// Looks up a word in a table of (word, meaning).
template <typename Table, typename T>
void take_word(const Json& json, const std::string& where, const Table& table, T& value) {
    std::string known;
    for (const auto& [word, meaning] : table) {
        if (json.is_string() && json == word) {
            value = meaning;
            return;
        }
        known += (known.empty() ? "'" : ", '") + std::string(word) + "'";
    }
    fail_manifest(where + "=" + shown(json) + ": one of " + known);
}

// A Python identifier.
[[nodiscard]] bool is_identifier(const std::string& name);
[[nodiscard]] bool is_ascii(const std::string& name);

void read_source(const Json& json, const std::string& where, Source& source);

// A symbol, or a size of at least 1.
void read_shape(const Json& json, const std::string& where, std::vector<Axis>& shape);

void read_sizes(const Json& json, const std::string& where, SizeRules& sizes);
void read_text(const Json& json, const std::string& where, TextRules& text);
void read_control(const Json& json, const std::string& where, Control& control);
void read_stage(const Json& json, const std::string& where, Stage& stage);
void read_preset(const Json& json, const std::string& where, Preset& preset);
void read_loop(const Json& json, const std::string& where, Loop& loop);
void read_schedule(const Json& json, const std::string& where, NoiseSchedule& schedule);
void read_solver(const Json& json, const std::string& where, Solver& solver);

}  // namespace higen::core
