// The contract: each stage is a pure function on named tensors (higen/stages.py has the same table, and says more).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "config.h"
#include "tensor.h"

namespace higen::core {

// One axis: a symbol of the table, or a fixed size where the symbol is "".
struct Axis {
    std::string_view symbol;
    std::int64_t size = 0;
};

struct TensorSpec {
    std::string_view name;
    std::vector<Axis> shape;
    bool is_float = true;
};

struct Stage {
    std::string name;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;

    // Name of an output in the graph, where it cannot be an input's name too: `next_` is put before it.
    [[nodiscard]] std::string graph_output(const TensorSpec& output) const;
};

using Sizes = std::map<std::string_view, std::int64_t>;

// The stage of that name: text_encoder, conditioner, spatial_unet, temporal_unet, vae_decoder or vae_encoder.
[[nodiscard]] const Stage& stage(std::string_view name);

// The symbols that a model's configuration fixes.
[[nodiscard]] Sizes dimensions(const ModelConfig& config);

// Check names, types and shapes of a stage's inputs. Throws a backend error that names the tensor.
void check_inputs(const Stage& stage, const Tensors& tensors, const Sizes& fixed);

// "[2, 3]"
[[nodiscard]] std::string to_text(const Shape& shape);

}  // namespace higen::core
