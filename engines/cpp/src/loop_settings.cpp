#include "loop_settings.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>

#include "errors.h"

namespace higen::core {
namespace {

constexpr double most_iterations = 100, most_order = 20;
constexpr std::int32_t most_reuse = 1000;

std::string number(double value) {
    auto text = std::to_string(value);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
    return text;
}

template <typename T>
std::string list(const T* values, std::size_t count) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i)
        text += (i > 0 ? ", " : "") + number(static_cast<double>(values[i]));
    return count == 1 ? text : "[" + text + "]";
}

template <std::size_t n>
std::string word(const char* name, const char* given, const char* const (&known)[n], const std::string& standard) {
    if (given == nullptr) return standard;
    std::string all;
    for (const auto* one : known) {
        if (std::string(given) == one) return one;
        all += (all.empty() ? "'" : ", '") + std::string(one) + "'";
    }
    fail_request(std::string(name) + "='" + given + "': one of " + all);
}

Interval interval_of(const higen_request& given, std::size_t loop, std::size_t loops) {
    const auto count = given.guidance_interval_count;
    if (given.guidance_interval == nullptr) return {};
    const auto* pair = given.guidance_interval;
    if (count == 2 * loops)
        pair += 2 * loop;
    else if (count != 2)
        fail_request("guidance_interval has " + std::to_string(count) + " numbers: two, or two per loop (" +
                     std::to_string(2 * loops) + ")");
    if (!(0 <= pair[0] && pair[0] <= pair[1] && pair[1] <= 1))
        fail_request("guidance_interval=" + list(pair, 2) + ": two numbers, 0 <= from <= to <= 1");
    return {pair[0], pair[1]};
}

std::optional<Windows> windows_of(const Manifest& manifest, const Loop& loop, const higen_request& given,
                                  std::size_t frames) {
    const auto& own = loop.windows;
    const auto least = std::max(manifest.sizes.fewest_frames, loop.least_frames);
    const auto most = !own ? manifest.sizes.most_frames : own->most > 0 ? own->most : own->length;
    const auto noise = word("window_noise", given.window_noise, window_noises, own ? own->noise : "shuffled");
    if (given.window_noise != nullptr && !own && given.windows == nullptr)
        fail_request("window_noise='" + noise + "': the loop " + loop.name + " has no windows; set windows too");
    std::optional<Windows> made = own;
    if (made) made->noise = noise;
    if (given.windows != nullptr) {
        const auto* numbers = given.windows;
        const auto count = given.window_count;
        if (count == 1 && numbers[0] == 0) {
            if (static_cast<std::int64_t>(frames) > most)
                fail_request("windows=0: the loop " + loop.name + " takes at most " + std::to_string(most) +
                             " frames at once, not " + std::to_string(frames));
            return std::nullopt;
        }
        const auto length = count > 0 ? std::int64_t{numbers[0]} : 0;
        const auto stride = count > 1 ? std::int64_t{numbers[1]} : std::max<std::int64_t>(1, length / 2);
        if (count < 1 || count > 2 || length < least || length > most || stride < 1 || stride > length)
            fail_request("windows=" + list(numbers, count) + ": a length from " + std::to_string(least) + " to " +
                         std::to_string(most) + " frames and a stride from 1 to the length, or 0 for the whole clip "
                                                "at once");
        made = Windows{length, stride, most, noise};
    }
    if (made && made->length >= static_cast<std::int64_t>(frames)) made.reset();
    return made;
}

std::optional<FreeInit> free_init_of(const Loop& loop, const higen_request& given, bool begins) {
    const auto filter = word("free_init_filter", given.free_init_filter, free_init_filters, free_init_filters[0]);
    const auto count = given.free_init_count;
    if (given.free_init == nullptr) {
        if (given.free_init_filter != nullptr)
            fail_request("free_init_filter='" + filter + "': free_init is not given");
        return std::nullopt;
    }
    const auto said = "free_init=" + list(given.free_init, count);
    double numbers[] = {1.0, 0.25, 0.25, 4.0};
    if (count >= 1 && count <= 4) std::copy_n(given.free_init, count, numbers);
    const auto is_whole = [](double value, double most) {
        return value >= 1 && value <= most && value == std::floor(value);
    };
    const auto is_part = [](double value) { return value >= 0 && value <= 1; };
    if (count < 1 || count > 4 || !is_whole(numbers[0], most_iterations) || !is_part(numbers[1]) ||
        !is_part(numbers[2]) || !is_whole(numbers[3], most_order))
        fail_request(said + ": iterations from 1 to " + number(most_iterations) +
                     ", and if wanted the stop frequencies in space and time (0 to 1) and the order of the filter (1 to " +
                     number(most_order) + ")");
    if (numbers[0] == 1.0) return std::nullopt;
    if (begins) fail_request(said + ": the loop " + loop.name + " begins from a picture or clip");
    if (last_level(loop.schedule).first == 0.0)
        fail_request(said + ": the loop " + loop.name +
                     " begins without any signal (its schedule ends at zero SNR), so nothing of a first pass would be "
                     "left");
    return FreeInit{static_cast<std::int64_t>(numbers[0]), numbers[1], numbers[2],
                    static_cast<std::int64_t>(numbers[3]), filter};
}

std::int64_t reuse_of(const Manifest& manifest, std::size_t index, const higen_request& given) {
    if (given.reuse == nullptr) return 1;
    const auto count = given.reuse_count, loops = manifest.loops.size();
    if (count != 1 && count != loops)
        fail_request("reuse has " + std::to_string(count) + " numbers: one, or one per loop (" + std::to_string(loops) +
                     ")");
    const auto every = given.reuse[count == 1 ? 0 : index];
    const auto said = "reuse=" + std::to_string(every) + ": ";
    if (every < 1 || every > most_reuse) fail_request(said + "a whole number from 1 to " + std::to_string(most_reuse));
    const auto& loop = manifest.loops[index];
    const auto stages = loop.own().names();
    const bool has = std::all_of(stages.begin(), stages.end(), [&](const auto& name) {
        return !manifest.stage(name).variants().empty();
    });
    if (every > 1 && !has)
        fail_request(said + "the loop " + loop.name + " of " + manifest.name +
                     " has no shallow steps; `higen-export onnx MODEL --reuse` adds them to a model");
    return every;
}

double stretch_of(const Manifest& manifest, std::size_t index, const higen_request& given, std::size_t frames,
                  bool begins) {
    const auto& loop = manifest.loops[index];
    const auto* preset = manifest.preset(given.preset);
    if (!loop.stretch || loop.least_frames > static_cast<std::int64_t>(frames)) return 1.0;
    const bool own = preset == nullptr || !preset->stretch[index];
    const auto by = own ? loop.stretch->by : *preset->stretch[index];
    if (by != 1.0 && begins) {
        const auto& control = loop.start->control;
        fail_request((own ? "loops." + loop.name + ".stretch" : "preset='" + preset->name + "'") + ": the loop " +
                     loop.name + " begins from " + control +
                     ", and its result is stretched only if it begins from noise; leave out " +
                     (own ? control : "one of the two"));
    }
    return by;
}

// Whether a request gives a control that takes part in drawing. The choice of a decoder does not.
bool gives_control(const Manifest& manifest, const higen_request& given) {
    const auto& preview = manifest.sizes.preview;
    const auto decodes = [&](const higen_control& control) {
        return preview && control.name != nullptr && preview->control == control.name;
    };
    return given.picture_count > 0 ||
           (given.controls != nullptr &&
            !std::all_of(given.controls, given.controls + given.control_count, decodes));
}

}  // namespace

const char* preset_name(const Manifest& manifest, const higen_request& given) {
    if (given.preset != nullptr) return given.preset;
    const bool negative = given.negative_tokens != nullptr ||
                          (given.negative_prompt != nullptr && *given.negative_prompt != '\0');
    const void* const settings[] = {given.steps,     given.guidance,         given.solvers, given.guidance_interval,
                                    given.windows,   given.window_noise,     given.free_init,
                                    given.free_init_filter, given.reuse,     given.inversion};
    if (negative || gives_control(manifest, given) ||
        std::any_of(std::begin(settings), std::end(settings), [](const void* one) { return one != nullptr; }))
        return nullptr;
    for (const auto& preset : manifest.presets)
        if (preset.usual) return preset.name.c_str();
    return nullptr;
}

bool Interval::holds(std::size_t row, std::size_t rows) const {
    const auto n = static_cast<double>(rows);
    return row >= static_cast<std::size_t>(n * from) && row < static_cast<std::size_t>(n * to);
}

LoopSettings loop_settings(const Manifest& manifest, std::size_t loop, const higen_request& given, std::size_t frames,
                           bool begins) {
    const auto& row = manifest.loops[loop];
    LoopSettings settings;
    settings.interval = interval_of(given, loop, manifest.loops.size());
    settings.reuse = reuse_of(manifest, loop, given);
    settings.stretch = stretch_of(manifest, loop, given, frames, begins);
    if (!row.every_frame) return settings;
    settings.windows = windows_of(manifest, row, given, frames);
    settings.free_init = free_init_of(row, given, begins);
    return settings;
}

void check_settings(const Manifest& manifest, const higen_request& given) {
    if (std::any_of(manifest.loops.begin(), manifest.loops.end(), [](const auto& loop) { return loop.every_frame; }))
        return;
    const std::pair<const char*, bool> set[] = {{"windows", given.windows != nullptr},
                                                {"window_noise", given.window_noise != nullptr},
                                                {"free_init", given.free_init != nullptr}};
    for (const auto& [name, is_set] : set)
        if (is_set) fail_request(std::string(name) + ": " + manifest.name + " has no loop over frames");
}

}  // namespace higen::core
