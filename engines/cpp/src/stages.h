// The rows of the manifest's table `stages` (docs/manifest.md): each stage is a pure function on named tensors.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace higen::core {

// One axis: a symbol, or a fixed size where the symbol is "".
struct Axis {
    std::string symbol;
    std::int64_t size = 0;
};

// Where an input comes from. `name` is that of a control, text, stage or loop; `output` is one of a stage or loop.
struct Source {
    enum class Kind { state, control, text, picture, clip, noise, known, made };

    Kind kind = Kind::state;
    std::string name;
    std::string output;
    std::uint64_t purpose = 0;  // of noise
    bool negative = false;      // made of the negative prompt
    bool resampled = false;     // a picture in the input's own size
    bool shown = false;         // pixels that a stage made, taken as a picture
    std::string given = {};     // made of the frames of this control, in place of a picture or clip
};

// Reads a source; `where` stands before its messages. Throws a manifest error that lists the kinds of sources.
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
    std::string weights;  // the file that its graph points into
    std::string lowest = "fp16";
    bool batch = true;
    std::int64_t deep = 0;  // channels of its deep features; 0: it has no variants

    // The same step twice: one that also gives its deep features, and the shallow one that takes them
    // (higen/feature_reuse.py). Empty for a stage without `deep`, and for one that is no solver step.
    [[nodiscard]] std::vector<Stage> variants() const;

    // Name of an output in the graph, where it cannot be an input's name too: `next_` is put before it.
    [[nodiscard]] std::string graph_output(const TensorSpec& output) const;

    // Whether the stage is a solver step: it gives `latents` and `previous`, and nothing else but deep features.
    [[nodiscard]] bool denoises() const;

    // The input or output of that name; a null pointer if there is none.
    [[nodiscard]] const TensorSpec* input(std::string_view wanted) const;
    [[nodiscard]] const TensorSpec* output(std::string_view wanted) const;
};

using Sizes = std::map<std::string, std::int64_t, std::less<>>;

// Check names, types and shapes of a stage's inputs. Throws a backend error that names the tensor.
void check_inputs(const Stage& stage, const Tensors& tensors, const Sizes& fixed);

// The name of deep features, an output of a full step and an input of a shallow one.
constexpr const char* deep_features = "deep";

// "[2, 3]"
[[nodiscard]] std::string to_text(const Shape& shape);

// The symbol of the tokens of all chunks of a text, which is free where there may be several (`text.chunks`).
constexpr const char* tokens_symbol = "T";

// The index of the axis of that symbol; `shape.size()` if there is none.
[[nodiscard]] std::size_t axis_of(const std::vector<Axis>& shape, std::string_view symbol);

}  // namespace higen::core
