// higen.json, version 2, as plain structures. The library interprets it as a program (docs/manifest.md).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "schedule.h"
#include "stages.h"

namespace higen::core {

constexpr std::int64_t max_side = 4096;
constexpr std::int64_t max_deep = 65536;  // channels of deep features

struct FileRecord {
    std::uintmax_t size = 0;
    std::string sha256;
};

using Files = std::map<std::string, FileRecord, std::less<>>;

// If the control `control`, of kind choice, is `choice`, the stage `decoder` turns latents into pixels. It also draws the
// previews of a running request.
struct Preview {
    std::string control, choice, decoder;
};

// Sizes that the model fixes, and limits and defaults of the sizes that a request chooses.
struct SizeRules {
    Sizes symbols;
    std::int64_t factor = 1;    // pixels per latent cell
    std::int64_t multiple = 1;  // width and height in pixels are multiples of this
    std::int64_t width = 1, height = 1, fps = 1;
    std::int64_t fewest_frames = 1, frames = 1, most_frames = 1;
    std::string decoder;
    std::int64_t chunk = 1;    // frames decoded at a time
    std::int64_t overlap = 0;  // extra frames on each side of a chunk, decoded with it and then dropped
    std::optional<Preview> preview;
};

// How a text becomes token ids: start, text, end, then padding up to `length`.
struct TextRules {
    std::string tokenizer = "tokenizer.json";
    std::int64_t length = 77;
    std::int64_t pad_id = 0;
    bool clean = true;
    bool weights = false;     // words have weights, `(word:1.3)`, and BREAK begins a new chunk
    std::int64_t chunks = 1;  // the most rows of ids

    // Whether every text is one row of ids and words have no weights.
    [[nodiscard]] bool plain() const { return !weights && chunks == 1; }
};

// A value of a control: a text, or numbers row by row (one number is 1 x 1, a list is rows x 1).
struct ControlValue {
    std::vector<double> numbers;
    std::size_t rows = 0;
    std::size_t columns = 0;
    std::string text;

    static ControlValue number(double value) { return {{value}, 1, 1, ""}; }
    static ControlValue of(std::string text) { return {{}, 0, 0, std::move(text)}; }
};

// Empty: unspecified, or a picture or clip that is not given.
using MaybeValue = std::optional<ControlValue>;

// What a request may set for this model.
struct Control {
    enum class Kind { number, whole, curve, text, picture, clip, choice, frames, mask, map };
    enum class Encoding { none, number, curve, sinusoid, similarity, edges };

    std::string name;
    Kind kind = Kind::number;
    Encoding encoding = Encoding::none;
    std::optional<double> low, high;
    std::vector<std::string> choices;
    MaybeValue standard;  // the key `default`
    bool optional = false;
    std::string meaning;

    [[nodiscard]] bool is_numeric() const { return kind == Kind::number || kind == Kind::whole || kind == Kind::curve; }
    // Whether its value is a picture or a clip, which can replace a loop's latents.
    [[nodiscard]] bool is_picture() const { return kind == Kind::picture || kind == Kind::clip; }
    // Whether its value consists of pixels.
    [[nodiscard]] bool is_visual() const {
        return is_picture() || kind == Kind::frames || kind == Kind::mask || kind == Kind::map;
    }
    [[nodiscard]] bool allows(double value) const { return (!low || value >= *low) && (!high || value <= *high); }
    // "a number from 0", "a whole number from 1 to 255"
    [[nodiscard]] std::string range() const;
};

// How the manifest writes a kind and an encoding; "" for none.
[[nodiscard]] const char* to_text(Control::Kind kind);
[[nodiscard]] const char* to_text(Control::Encoding encoding);

// A number, or the name of a control that gives it.
struct Scale {
    double value = 0;
    std::string control;
};

struct Offset {
    std::uint64_t purpose = 0;
    Scale scale;
};

struct Mix {
    std::string loop;
    Scale scale;
};

// The initial noise of a loop: the random stream `purpose`, and what is added to its noise.
struct NoiseRule {
    std::uint64_t purpose = 0;
    std::optional<Offset> offset;
    std::optional<Mix> mix;
};

// If the picture or clip `control` is given, the source `latents` replaces the loop's result.
struct Replaced {
    std::string control;
    Source latents;
};

// If the picture or clip `control` is given, the loop begins in the table's tail, from the source `latents`.
struct Start {
    std::string control;
    Source latents;
    Scale strength;       // the fraction of the rows that run
    bool needed = false;  // a request without the control is refused
};

// If `control`, of kind frames, is given, the loop's result passes through these frames; the source `latents` gives
// their latents. `mask`: a control of kind mask, or "". Where the mask is white, the frames are redrawn.
struct Known {
    std::string control;
    Source latents;
    std::string mask;
};

// The stages for a loop's steps: guided (both branches of guidance) and plain (one branch). "": none.
struct StagePair {
    std::string guided, plain;

    // The existing ones, the guided one first.
    [[nodiscard]] std::vector<std::string> names() const;
};

// If `control`, of kind map, is given, these stages do the steps.
struct Variant {
    std::string control;
    StagePair stages;
};

// Kinds of initial noise of a clip that is made in windows (higen/noise.py, frame_order).
constexpr const char* window_noises[] = {"fresh", "shuffled", "repeated"};

struct Windows {
    std::int64_t length = 1;
    std::int64_t stride = 1;
    std::int64_t most = 0;  // the most frames that the stages take at once; 0: `length`
    std::string noise = "fresh";

    [[nodiscard]] bool operator==(const Windows& other) const {
        return length == other.length && stride == other.stride && noise == other.noise;
    }
};

// After a loop's last row its latents x become z + by (x - z); z are the latents of the earlier loop `loop`.
struct Stretch {
    std::string loop;
    double by = 1.0;
};

// Values for what a request leaves out, one per loop; none: the loop's own value.
struct Preset {
    std::string name;
    std::vector<std::optional<std::int64_t>> steps;
    std::vector<std::optional<double>> guidance, stretch;
    bool usual = false;  // for requests that do not choose how to draw (preset_name)
};

// Frames larger than `height` or `width` latent cells are denoised in tiles that begin `stride` cells apart.
struct Tiles {
    std::int64_t height = 1;
    std::int64_t width = 1;
    std::int64_t stride = 1;
};

struct Loop {
    std::string name;
    std::string guided, plain;  // stages; "": none
    bool every_frame = false;   // over the request's frames; else over one
    std::int64_t least_frames = 1;
    NoiseSchedule schedule;
    std::string prediction;
    std::vector<Solver> solvers;  // the default first
    std::int64_t steps = 1;
    std::vector<double> guidance;  // spread evenly from the first frame to the last
    NoiseRule noise;
    std::map<std::string, double, std::less<>> controls;  // values that replace the request's in this loop
    std::optional<Replaced> replaced;
    std::optional<Start> start;
    std::optional<Windows> windows;
    std::optional<Tiles> tiles;
    std::optional<Known> known;
    std::optional<Variant> variant;
    std::optional<Stretch> stretch;

    // The stages for a request without a map.
    [[nodiscard]] StagePair own() const { return {guided, plain}; }
    // All stages that do its steps: the guided one first, the variant's stages last.
    [[nodiscard]] std::vector<std::string> stages() const;
    // The row of a solver; a null pointer if there is none.
    [[nodiscard]] const Solver* solver(std::string_view wanted) const;
    // Frames of the loop in a request for `frames`.
    [[nodiscard]] std::size_t frames_of(std::size_t frames) const { return every_frame ? frames : 1; }
};

struct GraphInput {
    std::string name;
    std::string dtype;
    std::vector<Axis> shape;
};

struct Manifest {
    std::string name, licence, family;
    std::vector<std::string> prompts;
    SizeRules sizes;
    std::optional<TextRules> text;
    std::vector<Control> controls;
    std::vector<Stage> stages;
    std::vector<Stage> variants;  // of the stages, in their order; not in the manifest's file
    std::vector<Loop> loops;
    std::vector<Preset> presets;
    std::map<std::string, std::vector<GraphInput>, std::less<>> graphs;  // the inputs of each graph itself
    Files files;

    // The row of that name; a null pointer if there is none.
    [[nodiscard]] const Control* control(std::string_view wanted) const;
    [[nodiscard]] const Loop* loop(std::string_view wanted) const;
    // The preset of that name; a null pointer for a null name. Throws a request error for an unknown one.
    [[nodiscard]] const Preset* preset(const char* wanted) const;
    // The row of a stage or variant; a null pointer if there is none.
    [[nodiscard]] const Stage* find_stage(std::string_view wanted) const;
    // The stage or variant of that name. Throws an internal error if there is none.
    [[nodiscard]] const Stage& stage(std::string_view wanted) const;
    // The stages of the loops, each once, in the order of the loops.
    [[nodiscard]] std::vector<std::string> denoising() const;
    // These stages and all stages that feed them, each once. A stage comes after the stages that feed it. Loops are
    // left out.
    [[nodiscard]] std::vector<std::string> feeding(const std::vector<std::string>& wanted) const;
    // The loops that a clip of this many frames needs: the last one that is not left out, and those that give latents
    // to it or to the decoder, directly or through others.
    [[nodiscard]] std::vector<const Loop*> wanted(std::size_t frames) const;
};

// Read a manifest: JSON, version, keys and types, references between the tables, seal. `where` names the file in
// messages. Throws a manifest error.
[[nodiscard]] Manifest parse_manifest(std::string_view json, const std::string& where);

// Check references between rows: names, sources, cycles, loops, decoder. Throws a manifest error.
void check_references(const Manifest& manifest);

// The seal that the tables in these bytes must have: their sha256 with the digits of `seal` written as zeros.
[[nodiscard]] std::string seal_of(std::string_view json, const std::string& seal);

}  // namespace higen::core
