// The rows of the tables `loops` and `presets`.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "manifest_tables.h"

namespace higen::core {
namespace {

constexpr std::int64_t max_frames = 1 << 16;
constexpr double max_stretch = 100.0;

bool fits_float(double value) { return std::abs(value) <= std::numeric_limits<float>::max(); }

// A name, or null for "".
void take_name(const Json& json, const std::string& where, std::string& name) {
    name.clear();
    if (!json.is_null()) Object::take(json, where, name);
}

void take_purpose(const Json& json, const std::string& where, std::uint64_t& purpose) {
    std::int64_t number = 0;
    Object::take(json, where, number);
    check_manifest(number >= 0 && number < std::int64_t{1} << 31,
                   where + "=" + shown(json) + ": a whole number from 0");
    purpose = static_cast<std::uint64_t>(number);
}

void read_scale(const Json& json, const std::string& where, Scale& scale) {
    constexpr const char* prefix = "control:";
    if (json.is_string() && json.get_ref<const std::string&>().rfind(prefix, 0) == 0) {
        scale.control = json.get<std::string>().substr(std::string(prefix).size());
        if (!scale.control.empty()) return;
    }
    if (!json.is_number()) fail_manifest(where + "=" + shown(json) + ": a number, or control:NAME of a number");
    Object::take(json, where, scale.value);
    check_manifest(fits_float(scale.value), where + "=" + shown(json) + ": a number that is finite in float32");
}

// Runs the row's own check; its message gets the place as prefix.
template <typename Check>
void check_row(const std::string& where, const Check& own) {
    try {
        own();
    } catch (const Error& error) {
        fail_manifest(where + ": " + error.what());
    }
}

// A row that may be null.
template <typename T>
void take_row(Object& object, const char* key, std::optional<T>& row,
              void (*read)(const Json&, const std::string&, T&)) {
    object.required(key, [&](const Json& json, const std::string& where) {
        row.reset();
        if (!json.is_null()) read(json, where, row.emplace());
    });
}

// A row that may be null, or missing in older files.
template <typename T>
void take_later_row(Object& object, const char* key, std::optional<T>& row,
                    void (*read)(const Json&, const std::string&, T&)) {
    object.key(key, [&](const Json& json, const std::string& where) {
        row.reset();
        if (!json.is_null()) read(json, where, row.emplace());
    });
}

void read_offset(const Json& json, const std::string& where, Offset& offset) {
    Object object(json, where);
    object.required("purpose",
                    [&](const auto& value, const auto& place) { take_purpose(value, place, offset.purpose); });
    object.required("scale", [&](const auto& value, const auto& place) { read_scale(value, place, offset.scale); });
    object.finish();
}

void read_mix(const Json& json, const std::string& where, Mix& mix) {
    Object object(json, where);
    object.required_value("loop", mix.loop);
    object.required("scale", [&](const auto& value, const auto& place) { read_scale(value, place, mix.scale); });
    object.finish();
}

void read_noise(const Json& json, const std::string& where, NoiseRule& noise) {
    Object object(json, where);
    object.required("purpose",
                    [&](const auto& value, const auto& place) { take_purpose(value, place, noise.purpose); });
    take_row(object, "offset", noise.offset, read_offset);
    take_row(object, "mix", noise.mix, read_mix);
    object.finish();
}

void read_replaced(const Json& json, const std::string& where, Replaced& replaced) {
    Object object(json, where);
    object.required_value("control", replaced.control);
    object.required("latents",
                    [&](const auto& value, const auto& place) { read_source(value, place, replaced.latents); });
    object.finish();
}

void read_start(const Json& json, const std::string& where, Start& start) {
    Object object(json, where);
    object.required_value("control", start.control);
    object.required("latents", [&](const auto& value, const auto& place) { read_source(value, place, start.latents); });
    object.required("strength",
                    [&](const auto& value, const auto& place) { read_scale(value, place, start.strength); });
    object.value("needed", start.needed);  // a newer key: it may be missing
    object.finish();
}

void read_tiles(const Json& json, const std::string& where, Tiles& tiles) {
    Object object(json, where);
    object.required_value("height", tiles.height);
    object.required_value("width", tiles.width);
    object.required_value("stride", tiles.stride);
    object.finish();
    check_manifest(tiles.stride >= 1 && tiles.stride <= std::min(tiles.height, tiles.width) &&
                       std::max(tiles.height, tiles.width) <= max_side,
                   where + ": height=" + std::to_string(tiles.height) + ", width=" + std::to_string(tiles.width) +
                       ", stride=" + std::to_string(tiles.stride) + ": sides of at most " + std::to_string(max_side) +
                       ", and a stride from 1 to the smaller one");
}

void read_known(const Json& json, const std::string& where, Known& known) {
    Object object(json, where);
    object.required_value("control", known.control);
    object.required("latents", [&](const auto& value, const auto& place) { read_source(value, place, known.latents); });
    object.required("mask", [&](const auto& value, const auto& place) { take_name(value, place, known.mask); });
    object.finish();
}

void read_variant(const Json& json, const std::string& where, Variant& variant) {
    Object object(json, where);
    object.required_value("control", variant.control);
    auto& stages = variant.stages;
    object.required("guided", [&](const auto& value, const auto& place) { take_name(value, place, stages.guided); });
    object.required("plain", [&](const auto& value, const auto& place) { take_name(value, place, stages.plain); });
    object.finish();
}

void check_factor(double by, const std::string& where) {
    check_manifest(by >= 0 && by <= max_stretch,
                   where + "=" + std::to_string(by) + ": a number from 0 to " +
                       std::to_string(static_cast<int>(max_stretch)));
}

void read_stretch(const Json& json, const std::string& where, Stretch& stretch) {
    Object object(json, where);
    object.required_value("loop", stretch.loop);
    object.required_value("by", stretch.by);
    object.finish();
    check_factor(stretch.by, where + ".by");
}

void read_windows(const Json& json, const std::string& where, Windows& windows) {
    Object object(json, where);
    object.required_value("length", windows.length);
    object.required_value("stride", windows.stride);
    object.key("most", [&](const Json& value, const std::string& place) {
        if (!value.is_null()) Object::take(value, place, windows.most);
        check_manifest(value.is_null() || (windows.most >= windows.length && windows.most <= max_frames),
                       place + "=" + shown(value) + ": at least length=" + std::to_string(windows.length));
    });
    object.key("noise", [&](const Json& value, const std::string& place) {
        constexpr std::pair<const char*, const char*> known[] = {
            {"fresh", "fresh"}, {"shuffled", "shuffled"}, {"repeated", "repeated"}};
        take_word(value, place, known, windows.noise);
    });
    object.finish();
    check_manifest(windows.stride >= 1 && windows.stride <= windows.length,
                   where + ": length=" + std::to_string(windows.length) + ", stride=" + std::to_string(windows.stride) +
                       ": a stride from 1 to the length");
}

// A number from 0, or a list of them.
void read_guidance(const Json& json, const std::string& where, std::vector<double>& guidance) {
    guidance.assign(1, 0.0);
    if (json.is_array())
        Object::take(json, where, guidance);
    else
        Object::take(json, where, guidance.front());
    const bool good = std::all_of(guidance.begin(), guidance.end(), [](double g) { return g >= 0 && fits_float(g); });
    check_manifest(good && !guidance.empty(), where + "=" + shown(json) + ": a number from 0, or a list of them");
}

void read_loop_controls(const Json& json, const std::string& where, Loop& loop) {
    if (!json.is_object()) fail_manifest(where + "=" + shown(json) + ": an object is wanted");
    for (const auto& item : json.items()) {
        const auto place = where + "." + item.key();
        double value = 0;
        Object::take(item.value(), place, value);
        check_manifest(fits_float(value), place + "=" + shown(item.value()) + ": a number that is finite in float32");
        loop.controls.emplace(item.key(), value);
    }
}

void check_loop(const Loop& loop, const std::string& where) {
    check_manifest(!loop.guided.empty() || !loop.plain.empty(), where + ": guided, plain: at least one stage");
    check_manifest(!loop.solvers.empty(), where + ".solvers: at least one");
    for (std::size_t i = 0; i < loop.solvers.size(); ++i)
        check_manifest(loop.solver(loop.solvers[i].name) == &loop.solvers[i],
                       where + ".solvers: " + loop.solvers[i].name + " appears twice");
    check_row(where, [&] {
        for (const auto& solver : loop.solvers) check(loop.schedule, loop.prediction, solver);
    });
    const auto most = max_steps(loop.schedule, loop.solvers.front());
    check_manifest(loop.steps >= 1 && loop.steps <= most,
                   where + ".steps=" + std::to_string(loop.steps) + ": from 1 to " + std::to_string(most));
    check_manifest(loop.least_frames >= 1 && loop.least_frames <= max_frames,
                   where + ".least_frames=" + std::to_string(loop.least_frames) + ": from 1");
}

}  // namespace

void read_loop(const Json& json, const std::string& where, Loop& loop) {
    Object object(json, where);
    object.required_value("name", loop.name);
    object.required("guided", [&](const auto& value, const auto& place) { take_name(value, place, loop.guided); });
    object.required("plain", [&](const auto& value, const auto& place) { take_name(value, place, loop.plain); });
    object.required("frames", [&](const Json& value, const std::string& place) {
        loop.every_frame = value == "F";
        check_manifest(loop.every_frame || (value.is_number_integer() && value == 1),
                       place + "=" + shown(value) + ": 1 or 'F'");
    });
    object.required_value("least_frames", loop.least_frames);
    object.required("schedule",
                    [&](const auto& value, const auto& place) { read_schedule(value, place, loop.schedule); });
    object.required("prediction", [&](const auto& value, const auto& place) {
        constexpr std::pair<const char*, const char*> known[] = {
            {"v", "v"}, {"epsilon", "epsilon"}, {"sample", "sample"}, {"flow", "flow"}};
        take_word(value, place, known, loop.prediction);
    });
    take_rows(object, "solvers", loop.solvers, read_solver);
    object.required_value("steps", loop.steps);
    object.required("guidance",
                    [&](const auto& value, const auto& place) { read_guidance(value, place, loop.guidance); });
    object.required("noise", [&](const auto& value, const auto& place) { read_noise(value, place, loop.noise); });
    object.required("controls", [&](const auto& value, const auto& place) { read_loop_controls(value, place, loop); });
    take_row(object, "replaced", loop.replaced, read_replaced);
    take_row(object, "start", loop.start, read_start);
    take_row(object, "windows", loop.windows, read_windows);
    take_later_row(object, "tiles", loop.tiles, read_tiles);
    take_later_row(object, "known", loop.known, read_known);
    take_later_row(object, "variant", loop.variant, read_variant);
    take_later_row(object, "stretch", loop.stretch, read_stretch);
    object.finish();
    check_loop(loop, where);
}

void read_preset(const Json& json, const std::string& where, Preset& preset) {
    Object object(json, where);
    object.required_value("name", preset.name);
    object.required_value("steps", preset.steps);
    object.required_value("guidance", preset.guidance);
    object.required_value("stretch", preset.stretch);
    object.value("usual", preset.usual);
    object.finish();
    check_manifest(is_ascii(preset.name) && is_identifier(preset.name),
                   where + ".name='" + preset.name + "': letters, digits and _");
    for (const auto& by : preset.stretch)
        if (by) check_factor(*by, where + ".stretch");
}

void read_schedule(const Json& json, const std::string& where, NoiseSchedule& schedule) {
    Object object(json, where);
    object.required_value("kind", schedule.kind);
    object.required_value("timesteps", schedule.timesteps);
    object.required_value("beta_start", schedule.beta_start);
    object.required_value("beta_end", schedule.beta_end);
    object.required_value("zero_terminal_snr", schedule.zero_terminal_snr);
    object.required_value("sigma_min", schedule.sigma_min);
    object.required_value("sigma_max", schedule.sigma_max);
    object.required_value("shift", schedule.shift);
    object.finish();
    check_row(where, [&] { check(schedule); });
}

void read_solver(const Json& json, const std::string& where, Solver& solver) {
    Object object(json, where);
    object.required_value("name", solver.name);
    object.required_value("spacing", solver.spacing);
    object.required_value("offset", solver.offset);
    object.required_value("final", solver.final);
    object.required_value("eta", solver.eta);
    object.required_value("rho", solver.rho);
    object.required_value("original_steps", solver.original_steps);
    object.finish();
    check_row(where, [&] { check(solver); });
}

}  // namespace higen::core
