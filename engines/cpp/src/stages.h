// The rows of the manifest's table `stages` (docs/manifest.md). Each stage is a pure function of named tensors.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace higen::core {

// One axis: a symbol, or a fixed size if the symbol is "".
struct Axis {
    std::string symbol;
    std::int64_t size = 0;
};

// Where an input comes from. `name` names a control, text, stage or loop; `output` names an output of a stage or loop.
struct Source {
    enum class Kind { state, control, text, picture, clip, noise, known, frames, places, made };

    Kind kind = Kind::state;
    std::string name;
    std::string output;
    std::uint64_t purpose = 0;  // of noise
    bool negative = false;      // made of the negative prompt
    bool resampled = false;     // a picture, resampled to the input's size
    bool shown = false;         // a stage's pixels, taken as a picture
    std::string given = {};     // made of this control's frames, not of a picture or clip
};

// Reads a source. Throws a manifest error that begins with `where` and lists the kinds of sources.
[[nodiscard]] Source parse_source(const std::string& text, const std::string& where);

// How the manifest writes a source.
[[nodiscard]] std::string to_text(const Source& source);

struct TensorSpec {
    std::string name;
    std::vector<Axis> shape;
    bool is_float = true;
    Source source = {};  // of an input
};

struct Stage {
    std::string name;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::string weights;  // the file that its graph takes weights from
    std::string lowest = "fp16";
    bool batch = true;
    std::int64_t deep = 0;  // channels of its deep features; 0: it has no variants

    // Two variants of the step: the full one also outputs its deep features, the shallow one takes them
    // (higen/feature_reuse.py). Empty for a stage without `deep`, and for a stage that is not a solver step.
    [[nodiscard]] std::vector<Stage> variants() const;

    // Name of an output in the graph. `next_` is put before it if an input has the same name, because a graph's names
    // differ.
    [[nodiscard]] std::string graph_output(const TensorSpec& output) const;

    // Whether the stage is a solver step: its outputs are `latents`, `previous`, and at most deep features.
    [[nodiscard]] bool denoises() const;

    // The input or output of that name; a null pointer if there is none.
    [[nodiscard]] const TensorSpec* input(std::string_view wanted) const;
    [[nodiscard]] const TensorSpec* output(std::string_view wanted) const;
};

using Sizes = std::map<std::string, std::int64_t, std::less<>>;

// Check names, types and shapes of a stage's inputs. Throws a backend error that names the tensor.
void check_inputs(const Stage& stage, const Tensors& tensors, const Sizes& fixed);

// The name of deep features: an output of the full step, and an input of the shallow step.
constexpr const char* deep_features = "deep";

// "[2, 3]"
[[nodiscard]] std::string to_text(const Shape& shape);

// The symbol for the number of tokens of all chunks of a text. It is free if texts can have several (`text.chunks`).
constexpr const char* tokens_symbol = "T";

// The index of the axis of that symbol; `shape.size()` if there is none.
[[nodiscard]] std::size_t axis_of(const std::vector<Axis>& shape, std::string_view symbol);

}  // namespace higen::core
