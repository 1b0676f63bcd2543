#include "request_pictures.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <utility>
#include <vector>

#include "edges.h"
#include "errors.h"
#include "picture_file.h"
#include "pictures.h"

namespace higen::core {
namespace {

std::string names_of_controls(const Manifest& manifest) {
    std::string names;
    for (const auto& control : manifest.controls) names += (names.empty() ? "" : ", ") + control.name;
    return names.empty() ? "none" : names;
}

std::vector<float> picture_of(const Control& control, const higen_picture& given, const Request& request) {
    const auto frames = control.kind == Control::Kind::clip ? request.frames : 1;
    constexpr auto most = static_cast<std::int32_t>(max_picture_side);
    if (given.rgb == nullptr || given.width < 1 || given.width > most || given.height < 1 ||
        given.height > most || given.frames < static_cast<std::int64_t>(frames) ||
        (frames == 1 && control.kind == Control::Kind::picture && given.frames != 1))
        fail_request(control.name + ": " + std::to_string(given.frames) + " frames of " + std::to_string(given.width) +
                     "x" + std::to_string(given.height) + " given; RGB of " + std::to_string(frames) +
                     (frames == 1 ? " frame" : " frames") + ", 1 to " + std::to_string(max_picture_side) +
                     " pixels a side, is wanted");
    const auto width = static_cast<std::size_t>(given.width), height = static_cast<std::size_t>(given.height);
    std::vector<std::uint8_t> rgb;
    for (std::size_t f = 0; f < frames; ++f) {
        const auto frame = cover(given.rgb + f * width * height * 3, width, height, request.width, request.height);
        rgb.insert(rgb.end(), frame.begin(), frame.end());
    }
    return planes(rgb, frames, request.width * request.height);
}

// RGB bytes of the first pictures of a control, each scaled to the request's size. Another size gives a warning.
std::vector<std::uint8_t> fitted(const std::string& name, const higen_picture& given, const Request& request,
                                 const Tokenizer::Warn& warn, std::size_t most_frames = ~std::size_t{0}) {
    constexpr auto most = static_cast<std::int32_t>(max_picture_side);
    if (given.rgb == nullptr || given.width < 1 || given.width > most || given.height < 1 || given.height > most)
        fail_request(name + ": " + std::to_string(given.width) + "x" + std::to_string(given.height) +
                     " given; RGB of 1 to " + std::to_string(max_picture_side) + " pixels a side is wanted");
    const auto width = static_cast<std::size_t>(given.width), height = static_cast<std::size_t>(given.height);
    if (width != request.width || height != request.height)
        warn(name + " has " + std::to_string(width) + "x" + std::to_string(height) + " pixels: scaled to cover " +
             std::to_string(request.width) + "x" + std::to_string(request.height) + ", and cropped");
    std::vector<std::uint8_t> rgb;
    for (std::size_t f = 0; f < std::min(static_cast<std::size_t>(given.frames), most_frames); ++f) {
        const auto frame = cover(given.rgb + f * width * height * 3, width, height, request.width, request.height);
        rgb.insert(rgb.end(), frame.begin(), frame.end());
    }
    return rgb;
}

// The brightness of a mask, from 0 to 1.
std::vector<float> mask_of(const std::string& name, const higen_picture& given, const Request& request,
                           const Tokenizer::Warn& warn) {
    if (given.frames != 1 && given.frames != static_cast<std::int64_t>(request.frames))
        fail_request(name + " has " + std::to_string(given.frames) + " frames: one picture, or the clip's " +
                     std::to_string(request.frames));
    const auto rgb = fitted(name, given, request, warn);
    std::vector<float> bright(rgb.size() / 3);
    for (std::size_t i = 0; i < bright.size(); ++i)
        bright[i] = static_cast<float>((rgb[3 * i] + rgb[3 * i + 1] + rgb[3 * i + 2]) / 765.0);
    return bright;
}

// A map for each frame of the clip, or the edges of these pictures. A single picture is used for all frames.
std::vector<float> map_of(const Control& control, const higen_picture& given, const Request& request,
                          const Tokenizer::Warn& warn) {
    if (given.frames != 1 && given.frames < static_cast<std::int64_t>(request.frames))
        fail_request(control.name + " has " + std::to_string(given.frames) + " frames: one picture, or the clip's " +
                     std::to_string(request.frames));
    const auto pixels = request.width * request.height;
    const auto shown = fitted(control.name, given, request, warn, request.frames);
    std::vector<std::uint8_t> rgb;
    for (std::size_t f = 0; f < request.frames; ++f) {
        const auto from = shown.begin() + static_cast<std::ptrdiff_t>(given.frames == 1 ? 0 : f * pixels * 3);
        std::vector<std::uint8_t> frame(from, from + static_cast<std::ptrdiff_t>(pixels * 3));
        if (control.encoding == Control::Encoding::edges) frame = edges(frame, request.width, request.height);
        rgb.insert(rgb.end(), frame.begin(), frame.end());
    }
    return planes(rgb, request.frames, pixels);
}

// "keyframes[-1]" as "keyframes" and "-1"; without an index, the whole name and "".
std::pair<std::string, std::string> indexed(const std::string& name) {
    const auto open = name.find('[');
    if (open == std::string::npos || name.back() != ']') return {name, ""};
    return {name.substr(0, open), name.substr(open + 1, name.size() - open - 2)};
}

// The frame that an index names: from 0, or negative, with -1 for the last frame.
std::size_t frame_of(const std::string& control, const std::string& index, std::size_t frames) {
    std::int64_t at = 0;
    const auto [end, error] = std::from_chars(index.data(), index.data() + index.size(), at);
    if (index.empty() || error != std::errc() || end != index.data() + index.size())
        fail_request(control + ": frame '" + index + "': the index of a frame, a whole number: " + control + "[0]");
    const auto count = static_cast<std::int64_t>(frames);
    if (at < -count || at >= count)
        fail_request(control + ": frame " + index + ": the clip has " + std::to_string(count) + " frames: 0 to " +
                     std::to_string(count - 1) + ", or -1 to " + std::to_string(-count) + " from the end");
    return static_cast<std::size_t>(at < 0 ? at + count : at);
}

// The known frames of a control, by frame index.
using KnownFrames = std::map<std::size_t, std::vector<std::uint8_t>>;

void take_known(const Control& control, const std::string& index, const higen_picture& given, const Request& request,
                const Tokenizer::Warn& warn, KnownFrames& known) {
    const auto place = frame_of(control.name, index, request.frames);
    const auto name = control.name + "[" + std::to_string(place) + "]";
    if (known.count(place) > 0)
        fail_request(control.name + ": frame " + index + ": frame " + std::to_string(place) +
                     " is given twice; one picture for each frame");
    if (given.frames != 1)
        fail_request(name + ": " + std::to_string(given.frames) + " frames given; one picture is wanted");
    known.emplace(place, fitted(name, given, request, warn));
}

void take_picture(const Manifest& manifest, const higen_picture& given, Request& request, const Tokenizer::Warn& warn,
                  std::set<std::string>& named, std::map<std::string, KnownFrames>& known) {
    const auto [base, index] = indexed(given.name == nullptr ? "" : given.name);
    const auto* frames = manifest.control(base);
    if (frames != nullptr && frames->kind == Control::Kind::frames)
        return take_known(*frames, index, given, request, warn, known[base]);
    const auto& control = control_of(manifest, given.name, named);
    if (!control.is_visual()) fail_request(control.name + ": takes no picture, it is a " + to_text(control.kind));
    auto& pixels = request.pictures[control.name];
    if (control.kind == Control::Kind::map)
        pixels = map_of(control, given, request, warn);
    else if (control.kind == Control::Kind::mask)
        pixels = mask_of(control.name, given, request, warn);
    else
        pixels = picture_of(control, given, request);
}

}  // namespace

const Control& control_of(const Manifest& manifest, const char* name, std::set<std::string>& named) {
    if (name == nullptr) fail_request("a control's name is NULL: one of " + names_of_controls(manifest));
    const auto* control = manifest.control(name);
    if (control == nullptr)
        fail_request("control '" + std::string(name) + "': unknown; this model takes " + names_of_controls(manifest));
    if (!named.insert(name).second) fail_request("control '" + std::string(name) + "': is given twice");
    return *control;
}

void take_pictures(const Manifest& manifest, const higen_request& given, Request& request, const Tokenizer::Warn& warn,
                   std::set<std::string>& named) {
    std::map<std::string, KnownFrames> known;
    for (std::size_t i = 0; i < given.picture_count; ++i)
        take_picture(manifest, given.pictures[i], request, warn, named, known);
    for (const auto& [name, frames] : known) {
        std::vector<std::uint8_t> rgb;
        for (const auto& [place, frame] : frames) {
            request.places[name].push_back(place);
            rgb.insert(rgb.end(), frame.begin(), frame.end());
        }
        request.pictures[name] = planes(rgb, frames.size(), request.width * request.height);
    }
}

void check_known(const Manifest& manifest, const Request& request) {
    std::set<std::string> taken;
    for (const auto* loop : manifest.wanted(request.frames)) {
        if (request.passes(*loop)) taken.insert({loop->known->control, loop->known->mask});
        if (request.runs(*loop) && loop->variant) taken.insert(loop->variant->control);
    }
    for (const auto& control : manifest.controls) {
        if (!request.has_picture(control.name) || taken.count(control.name) > 0) continue;
        if (control.kind == Control::Kind::frames)
            fail_request(control.name + ": a request for " + std::to_string(request.frames) +
                         " frames takes no known frames");
        if (control.kind == Control::Kind::map) fail_request(control.name + ": no loop of this request takes it");
        if (control.kind == Control::Kind::mask)
            fail_request(control.name + ": no frames are known: give a control of kind frames as well");
    }
}

}  // namespace higen::core
