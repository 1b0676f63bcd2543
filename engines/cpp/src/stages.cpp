#include "stages.h"

#include <algorithm>

#include "errors.h"

namespace higen::core {
namespace {

TensorSpec tensor(std::string_view name, std::vector<std::string_view> symbols, bool is_float = true) {
    TensorSpec spec{name, {}, is_float};
    for (const auto symbol : symbols) {
        if (symbol == "1" || symbol == "3")
            spec.shape.push_back({"", symbol == "1" ? 1 : 3});
        else
            spec.shape.push_back({symbol});
    }
    return spec;
}

Stage denoising_stage(std::string name, std::string_view frames) {
    const std::vector<TensorSpec> state = {tensor("latents", {"B", "C", frames, "H", "W"}),
                                           tensor("previous", {"B", "C", frames, "H", "W"})};
    Stage stage{std::move(name), state, state};
    stage.inputs.push_back(tensor("t", {"B"}, false));
    for (const auto column : {"A", "B", "C", "alpha", "sigma", "guidance"})
        stage.inputs.push_back(tensor(column, {"B"}));
    stage.inputs.push_back(tensor("context", {"B", "K", "Dc"}));
    stage.inputs.push_back(tensor("empty_context", {"B", "K", "Dc"}));
    stage.inputs.push_back(tensor("frame_embedding", {"B", frames, "E"}));
    return stage;
}

std::vector<Stage> make_stages() {
    std::vector<Stage> stages = {
        {"text_encoder", {tensor("tokens", {"B", "L"}, false)}, {tensor("hidden", {"B", "L", "Dt"})}},
        {"conditioner",
         {tensor("hidden", {"B", "L", "Dt"}), tensor("motion", {"B", "F", "D"}), tensor("appearance", {"B", "F", "R"})},
         {tensor("context", {"B", "K", "Dc"}), tensor("frame_embedding", {"B", "F", "E"})}},
        denoising_stage("spatial_unet", "1"),
        denoising_stage("temporal_unet", "F"),
        {"vae_decoder", {tensor("latents", {"N", "C", "H", "W"})}, {tensor("pixels", {"N", "3", "Y", "X"})}},
        {"vae_encoder", {tensor("pixels", {"N", "3", "Y", "X"})}, {tensor("latents", {"N", "C", "H", "W"})}},
    };
    stages[3].inputs.push_back(tensor("prior", {"B", "C", "H", "W"}));
    return stages;
}

std::string describe(const TensorSpec& spec, const Sizes& sizes) {
    std::string text = spec.is_float ? "float32 [" : "int64 [";
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
        const auto& axis = spec.shape[i];
        if (i > 0) text += ", ";
        if (axis.symbol.empty()) {
            text += std::to_string(axis.size);
            continue;
        }
        text += axis.symbol;
        if (const auto known = sizes.find(axis.symbol); known != sizes.end())
            text += "=" + std::to_string(known->second);
    }
    return text + "]";
}

bool fits(const TensorSpec& spec, const Tensor& tensor, Sizes& sizes) {
    if (tensor.is_float() != spec.is_float || tensor.shape().size() != spec.shape.size()) return false;
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
        const auto& axis = spec.shape[i];
        const auto size = tensor.shape()[i];
        const auto wanted = axis.symbol.empty() ? axis.size : sizes.try_emplace(axis.symbol, size).first->second;
        if (size != wanted) return false;
    }
    return true;
}

}  // namespace

std::string Stage::graph_output(const TensorSpec& output) const {
    const bool taken =
        std::any_of(inputs.begin(), inputs.end(), [&](const auto& input) { return input.name == output.name; });
    return (taken ? "next_" : "") + std::string(output.name);
}

const Stage& stage(std::string_view name) {
    static const std::vector<Stage> stages = make_stages();
    const auto found = std::find_if(stages.begin(), stages.end(), [&](const auto& s) { return s.name == name; });
    if (found == stages.end()) throw Error(HIGEN_ERROR_INTERNAL, "no stage " + std::string(name));
    return *found;
}

Sizes dimensions(const ModelConfig& config) {
    const auto& unet = config.unet;
    return {{"L", config.text.context_length}, {"C", unet.in_channels},     {"Dt", unet.text_dim},
            {"D", unet.base_channels},         {"R", unet.appearance_columns}, {"K", unet.context_tokens},
            {"Dc", unet.context_dim},          {"E", unet.embedding_dim()}};
}

void check_inputs(const Stage& stage, const Tensors& tensors, const Sizes& fixed) {
    Sizes sizes = fixed;
    for (const auto& spec : stage.inputs) {
        const auto given = tensors.find(spec.name);
        if (given == tensors.end()) fail_backend(stage.name + ": the input " + std::string(spec.name) + " is missing");
        if (!fits(spec, *given->second, sizes))
            fail_backend(stage.name + "." + std::string(spec.name) + ": " +
                         (given->second->is_float() ? "float32 " : "int64 ") + to_text(given->second->shape()) +
                         " given, " + describe(spec, sizes) + " wanted");
    }
    if (tensors.size() != stage.inputs.size()) fail_backend(stage.name + ": unknown inputs were given");
}

std::string to_text(const Shape& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

}  // namespace higen::core
