#include "stages.h"

#include <algorithm>

#include "errors.h"

namespace higen::core {
namespace {

constexpr const char* kinds_of_sources =
    "state, control:NAME, text:prompt, text:negative, picture:NAME, picture:NAME:clip, picture:STAGE.OUTPUT, "
    "picture:STAGE.OUTPUT:clip, clip:NAME, noise:P, known:latents, known:mask, frames:NAME, places:NAME, STAGE.OUTPUT, "
    "STAGE@negative.OUTPUT, STAGE@CONTROL.OUTPUT or LOOP.latents";

bool is_name(std::string_view text) {
    return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
        return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c >= 0x80;
    });
}

// If the text begins with `prefix`, remove it and return true.
bool follows(std::string_view& text, std::string_view prefix) {
    if (text.substr(0, prefix.size()) != prefix) return false;
    text.remove_prefix(prefix.size());
    return true;
}

bool cut(std::string_view& text, std::string_view suffix) {
    if (text.size() < suffix.size() || text.substr(text.size() - suffix.size()) != suffix) return false;
    text.remove_suffix(suffix.size());
    return true;
}

// Read a source of a fixed kind, "KIND:NAME". Returns whether it is well formed.
bool take_kind(std::string_view rest, Source& source) {
    if (follows(rest, "control:")) {
        source.kind = Source::Kind::control;
    } else if (follows(rest, "text:")) {
        source.kind = Source::Kind::text;
        if (rest != "prompt" && rest != "negative") return false;
    } else if (follows(rest, "picture:")) {
        source.kind = Source::Kind::picture;
        source.resampled = cut(rest, ":clip");
        if (const auto dot = rest.find('.'); dot != std::string_view::npos) {
            source.kind = Source::Kind::made;
            source.shown = true;
            source.output = rest.substr(dot + 1);
            rest = rest.substr(0, dot);
            if (!is_name(source.output)) return false;
        }
    } else if (follows(rest, "known:")) {
        source.kind = Source::Kind::known;
        if (rest != "latents" && rest != "mask") return false;
    } else if (follows(rest, "clip:")) {
        source.kind = Source::Kind::clip;
    } else if (follows(rest, "frames:")) {
        source.kind = Source::Kind::frames;
    } else if (follows(rest, "places:")) {
        source.kind = Source::Kind::places;
    } else if (follows(rest, "noise:")) {
        source.kind = Source::Kind::noise;
        const bool digits = std::all_of(rest.begin(), rest.end(), [](char c) { return c >= '0' && c <= '9'; });
        if (!digits || rest.empty() || rest.size() > 9) return false;
        source.purpose = std::stoull(std::string(rest));
    } else {
        return false;
    }
    source.name = rest;
    return is_name(rest);
}

// Read "STAGE.OUTPUT", "STAGE@negative.OUTPUT" or "STAGE@CONTROL.OUTPUT". Returns whether it is well formed.
bool take_made(std::string_view rest, Source& source) {
    const auto dot = rest.find('.');
    if (dot == std::string_view::npos) return false;
    auto owner = rest.substr(0, dot);
    source.kind = Source::Kind::made;
    source.negative = cut(owner, "@negative");
    if (const auto at = owner.find('@'); at != std::string_view::npos && !source.negative) {
        source.given = owner.substr(at + 1);
        owner = owner.substr(0, at);
        if (!is_name(source.given)) return false;
    }
    source.name = owner;
    source.output = rest.substr(dot + 1);
    return is_name(source.name) && is_name(source.output);
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

const TensorSpec* find(const std::vector<TensorSpec>& specs, std::string_view name) {
    const auto found = std::find_if(specs.begin(), specs.end(), [&](const auto& spec) { return spec.name == name; });
    return found == specs.end() ? nullptr : &*found;
}

}  // namespace

Source parse_source(const std::string& text, const std::string& where) {
    Source source;
    if (text == "state") return source;
    if (take_kind(text, source)) return source;
    source = {};
    if (take_made(text, source)) return source;
    fail_manifest(where + "='" + text.substr(0, 60) + "': " + kinds_of_sources);
}

std::string to_text(const Source& source) {
    switch (source.kind) {
        case Source::Kind::state: return "state";
        case Source::Kind::control: return "control:" + source.name;
        case Source::Kind::text: return "text:" + source.name;
        case Source::Kind::picture: return "picture:" + source.name + (source.resampled ? ":clip" : "");
        case Source::Kind::clip: return "clip:" + source.name;
        case Source::Kind::noise: return "noise:" + source.name;
        case Source::Kind::known: return "known:" + source.name;
        case Source::Kind::frames: return "frames:" + source.name;
        case Source::Kind::places: return "places:" + source.name;
        case Source::Kind::made: break;
    }
    if (source.shown) return "picture:" + source.name + "." + source.output + (source.resampled ? ":clip" : "");
    const auto replaced = source.given.empty() ? "" : "@" + source.given;
    return source.name + (source.negative ? "@negative" : replaced) + "." + source.output;
}

std::string Stage::graph_output(const TensorSpec& output) const {
    return (input(output.name) != nullptr ? "next_" : "") + output.name;
}

bool Stage::denoises() const {
    const std::size_t own = output(deep_features) != nullptr ? 3 : 2;
    return outputs.size() == own && output("latents") != nullptr && output("previous") != nullptr;
}

std::vector<Stage> Stage::variants() const {
    const auto* state = input("latents");
    if (deep == 0 || !denoises() || state == nullptr || state->shape.size() != 5) return {};
    TensorSpec features{deep_features, state->shape};
    features.shape[1] = {"", deep * (input("guidance") != nullptr ? 2 : 1)};
    Stage full = *this, shallow = *this;
    full.deep = shallow.deep = 0;
    full.name += "_deep", shallow.name += "_shallow";
    full.outputs.push_back(features);
    shallow.inputs.push_back(features);
    return {full, shallow};
}

const TensorSpec* Stage::input(std::string_view wanted) const { return find(inputs, wanted); }

const TensorSpec* Stage::output(std::string_view wanted) const { return find(outputs, wanted); }

void check_inputs(const Stage& stage, const Tensors& tensors, const Sizes& fixed) {
    Sizes sizes = fixed;
    for (const auto& spec : stage.inputs) {
        const auto given = tensors.find(spec.name);
        if (given == tensors.end()) fail_backend(stage.name + ": the input " + spec.name + " is missing");
        if (!fits(spec, *given->second, sizes))
            fail_backend(stage.name + "." + spec.name + ": " + (given->second->is_float() ? "float32 " : "int64 ") +
                         to_text(given->second->shape()) + " given, " + describe(spec, sizes) + " wanted");
    }
    if (tensors.size() != stage.inputs.size()) fail_backend(stage.name + ": unknown inputs were given");
}

std::string to_text(const Shape& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

std::size_t axis_of(const std::vector<Axis>& shape, std::string_view symbol) {
    const auto found =
        std::find_if(shape.begin(), shape.end(), [&](const auto& axis) { return axis.symbol == symbol; });
    return static_cast<std::size_t>(found - shape.begin());
}

}  // namespace higen::core
