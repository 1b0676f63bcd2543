#include "manifest_tables.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "text.h"

namespace higen::core {
namespace {

constexpr std::int64_t max_frames = 1 << 16;

// Names of what every request may set for any model, and of other arguments of a call. No control may have them.
constexpr const char* reserved[] = {
    "prompt", "negative_prompt", "seed",      "steps",            "guidance", "solver", "guidance_interval",
    "windows", "window_noise",   "free_init", "free_init_filter", "reuse",    "preset", "inversion",
    "frames", "width",           "height",    "fps",              "progress", "warn",   "negative"};
constexpr const char* free_symbols[] = {"B", "F", "N", "H", "W", "Y", "X"};

using Kind = Control::Kind;
using Encoding = Control::Encoding;

constexpr std::pair<const char*, Kind> kinds[] = {
    {"number", Kind::number},   {"whole", Kind::whole}, {"curve", Kind::curve},  {"text", Kind::text},
    {"picture", Kind::picture}, {"clip", Kind::clip},   {"choice", Kind::choice},
    {"frames", Kind::frames},   {"mask", Kind::mask},   {"map", Kind::map}};
constexpr std::pair<const char*, Encoding> encodings[] = {{"number", Encoding::number},
                                                          {"curve", Encoding::curve},
                                                          {"sinusoid", Encoding::sinusoid},
                                                          {"similarity", Encoding::similarity},
                                                          {"edges", Encoding::edges}};

template <typename Names>
bool is_among(const Names& names, const std::string& name) {
    return std::any_of(std::begin(names), std::end(names), [&](const char* one) { return name == one; });
}

}  // namespace

bool is_identifier(const std::string& name) {
    const auto letters = decode_utf8(name);
    return letters && !letters->empty() && !is_number(letters->front()) &&
           std::all_of(letters->begin(), letters->end(), [](char32_t c) { return is_word(c); });
}

bool is_ascii(const std::string& name) {
    return std::all_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x80; });
}

namespace {

bool fits_float(double value) { return std::abs(value) <= std::numeric_limits<float>::max(); }

// A number as Python's format "g" writes it.
std::string short_text(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

void read_frames(const Json& json, const std::string& where, SizeRules& sizes) {
    std::vector<std::int64_t> frames;
    Object::take(json, where, frames);
    const bool good = frames.size() == 3 && 1 <= frames[0] && frames[0] <= frames[1] && frames[1] <= frames[2] &&
                      frames[2] <= max_frames;
    check_manifest(good, where + ": three numbers, 1 <= fewest <= default <= most <= " + std::to_string(max_frames));
    sizes.fewest_frames = frames[0], sizes.frames = frames[1], sizes.most_frames = frames[2];
}

void read_symbols(const Json& json, const std::string& where, Sizes& symbols) {
    if (!json.is_object()) fail_manifest(where + "=" + shown(json) + ": an object is wanted");
    for (const auto& item : json.items()) {
        const auto place = where + "." + item.key();
        std::int64_t size = 0;
        Object::take(item.value(), place, size);
        check_manifest(is_identifier(item.key()) && !is_among(free_symbols, item.key()),
                       place + ": a name other than B, F, N, H, W, Y, X");
        check_manifest(size >= 1 && size <= std::int64_t{1} << 31,
                       place + "=" + std::to_string(size) + ": a whole number from 1");
        symbols.emplace(item.key(), size);
    }
}

void check_sizes(const SizeRules& sizes, const std::string& where) {
    const auto number = [&](const char* name, std::int64_t value) {
        return where + "." + name + "=" + std::to_string(value) + ": ";
    };
    check_manifest(sizes.factor >= 1 && sizes.factor <= 1024,
                   number("factor", sizes.factor) + "from 1 to 1024 pixels per latent cell");
    check_manifest(sizes.multiple >= 1 && sizes.multiple <= max_side && sizes.multiple % sizes.factor == 0,
                   number("multiple", sizes.multiple) + "a multiple of factor=" + std::to_string(sizes.factor) +
                       " of at most " + std::to_string(max_side));
    for (const auto& [name, side] : {std::pair("width", sizes.width), std::pair("height", sizes.height)})
        check_manifest(side >= 1 && side <= max_side && side % sizes.multiple == 0,
                       number(name, side) + "a multiple of " + std::to_string(sizes.multiple) + " of at most " +
                           std::to_string(max_side));
    check_manifest(sizes.fps >= 1 && sizes.fps <= 240, number("fps", sizes.fps) + "from 1 to 240");
    check_manifest(sizes.chunk >= 1 && sizes.chunk <= max_frames,
                   number("chunk", sizes.chunk) + "a number of frames from 1");
    check_manifest(sizes.overlap >= 0 && sizes.overlap <= max_frames,
                   number("overlap", sizes.overlap) + "a number of frames from 0");
}

// The key `default`: null, a number in the range, one of the choices, or a text.
void take_default(const Json& json, const std::string& where, Control& control) {
    control.standard.reset();
    const auto place = where + "=" + shown(json) + ": ";
    if (json.is_null()) {
        check_manifest(control.optional || control.is_visual(),
                       place + to_text(control.kind) + " needs a default unless it is optional");
    } else if (control.is_numeric()) {
        const bool whole = control.kind != Kind::whole || json.is_number_integer();
        check_manifest(
            json.is_number() && whole && fits_float(json.get<double>()) && control.allows(json.get<double>()),
            place + control.range());
        control.standard = ControlValue::number(json.get<double>());
    } else {
        check_manifest(json.is_string() && !control.is_visual(), place + "null, or a text");
        const auto& text = json.get_ref<const std::string&>();
        const auto& choices = control.choices;
        check_manifest(control.kind != Kind::choice || std::find(choices.begin(), choices.end(), text) != choices.end(),
                       place + "one of the choices");
        control.standard = ControlValue::of(text);
    }
}

void check_control(const Control& control, const std::string& where) {
    check_manifest(is_identifier(control.name) && !is_among(reserved, control.name),
                   where + ".name='" + control.name + "': a name that is not reserved");
    const auto encoding = control.encoding;
    bool fits = encoding == Encoding::none;
    if (control.kind == Kind::curve)
        fits = encoding != Encoding::none && encoding != Encoding::number && encoding != Encoding::edges;
    if (control.kind == Kind::map) fits = fits || encoding == Encoding::edges;
    if (control.kind == Kind::number || control.kind == Kind::whole)
        fits = encoding == Encoding::number || encoding == Encoding::curve;
    if (control.kind == Kind::choice) fits = encoding == Encoding::number;
    check_manifest(fits, where + ".encoding=" + (encoding == Encoding::none ? "null" : to_text(encoding)) +
                             ": sinusoid, similarity or curve for a curve; number or curve for a number or whole; "
                             "number for a choice; edges or null for a map; otherwise null; the kind is " +
                             to_text(control.kind));
    check_manifest(!control.low || !control.high || *control.low <= *control.high,
                   where + ": low must be at most high");
    check_manifest(control.choices.empty() == (control.kind != Kind::choice),
                   where + ".choices: for a choice, and only for a choice");
    check_manifest(!control.optional || encoding == Encoding::sinusoid || encoding == Encoding::similarity,
                   where + ".optional: only with the encoding sinusoid or similarity");
}

void read_input(const Json& json, const std::string& where, TensorSpec& tensor) {
    Object object(json, where);
    object.required_value("name", tensor.name);
    object.required("dtype", [&](const Json& value, const std::string& place) {
        constexpr std::pair<const char*, bool> dtypes[] = {{"float32", true}, {"int64", false}};
        take_word(value, place, dtypes, tensor.is_float);
    });
    object.required("shape",
                    [&](const Json& value, const std::string& place) { read_shape(value, place, tensor.shape); });
    object.required("source",
                    [&](const Json& value, const std::string& place) { read_source(value, place, tensor.source); });
    object.finish();
}

void read_output(const Json& json, const std::string& where, TensorSpec& tensor) {
    Object object(json, where);
    object.required_value("name", tensor.name);
    object.required("shape",
                    [&](const Json& value, const std::string& place) { read_shape(value, place, tensor.shape); });
    object.finish();
}

}  // namespace

void read_source(const Json& json, const std::string& where, Source& source) {
    std::string text;
    Object::take(json, where, text);
    source = parse_source(text, where);
}

const char* to_text(Control::Kind kind) {
    for (const auto& [name, value] : kinds)
        if (value == kind) return name;
    return "";
}

const char* to_text(Control::Encoding encoding) {
    for (const auto& [name, value] : encodings)
        if (value == encoding) return name;
    return "";
}

std::string Control::range() const {
    const std::string words = kind == Kind::whole ? "a whole number" : "a number";
    return words + (low ? " from " + short_text(*low) : "") + (high ? " to " + short_text(*high) : "");
}

void read_shape(const Json& json, const std::string& where, std::vector<Axis>& shape) {
    if (!json.is_array()) fail_manifest(where + "=" + shown(json) + ": a list of symbols and sizes is wanted");
    shape.clear();
    for (const auto& item : json) {
        const auto place = where + "[" + std::to_string(shape.size()) + "]";
        auto& axis = shape.emplace_back();
        if (item.is_string()) {
            axis.symbol = item.get<std::string>();
            check_manifest(!axis.symbol.empty(), place + "=\"\": a symbol or a size");
        } else {
            Object::take(item, place, axis.size);
            check_manifest(axis.size >= 1 && axis.size <= std::int64_t{1} << 31,
                           place + "=" + shown(item) + ": a size from 1");
        }
    }
}

void read_preview(const Json& json, const std::string& where, SizeRules& sizes) {
    sizes.preview.reset();
    if (json.is_null()) return;
    auto& preview = sizes.preview.emplace();
    Object object(json, where);
    object.required_value("control", preview.control);
    object.required_value("choice", preview.choice);
    object.required_value("decoder", preview.decoder);
    object.finish();
}

void read_sizes(const Json& json, const std::string& where, SizeRules& sizes) {
    Object object(json, where);
    object.required("symbols",
                    [&](const auto& value, const auto& place) { read_symbols(value, place, sizes.symbols); });
    object.required_value("factor", sizes.factor);
    object.required_value("multiple", sizes.multiple);
    object.required_value("width", sizes.width);
    object.required_value("height", sizes.height);
    object.required_value("fps", sizes.fps);
    object.required("frames", [&](const auto& value, const auto& place) { read_frames(value, place, sizes); });
    object.required_value("decoder", sizes.decoder);
    object.required_value("chunk", sizes.chunk);
    object.required_value("overlap", sizes.overlap);
    object.key("preview", [&](const auto& value, const auto& place) { read_preview(value, place, sizes); });
    object.finish();
    check_sizes(sizes, where);
}

void read_text(const Json& json, const std::string& where, TextRules& text) {
    Object object(json, where);
    object.required_value("tokenizer", text.tokenizer);
    object.required_value("length", text.length);
    object.required_value("pad_id", text.pad_id);
    object.required_value("clean", text.clean);
    std::optional<std::string> weights;
    object.value("weights", weights);
    object.value("chunks", text.chunks);
    object.finish();
    check_manifest(!weights || *weights == "parentheses", where + ".weights: null or 'parentheses'");
    check_manifest(text.chunks >= 1 && text.chunks <= 64, where + ".chunks: from 1 to 64");
    text.weights = weights.has_value();
    check_manifest(
        text.length >= 3 && text.length <= 1 << 20 && text.pad_id >= 0 && text.pad_id < std::int64_t{1} << 31,
        where + ": length=" + std::to_string(text.length) + ", pad_id=" + std::to_string(text.pad_id) +
            ": length with room for start, text and end; pad_id from 0");
}

void read_control(const Json& json, const std::string& where, Control& control) {
    Object object(json, where);
    object.required_value("name", control.name);
    object.required("kind",
                    [&](const auto& value, const auto& place) { take_word(value, place, kinds, control.kind); });
    object.required_value("meaning", control.meaning);
    std::optional<std::string> measured;  // how a clip's own curve is measured; this library does not measure
    object.value("measured", measured);
    check_manifest(!measured || (control.kind == Kind::curve && (*measured == "distance" || *measured == "similarity")),
                   where + ".measured: null, or for a curve 'distance' or 'similarity'");
    object.required("encoding", [&](const auto& value, const auto& place) {
        control.encoding = Encoding::none;
        if (!value.is_null()) take_word(value, place, encodings, control.encoding);
    });
    object.required_value("low", control.low);
    object.required_value("high", control.high);
    object.required_value("choices", control.choices);
    object.required_value("optional", control.optional);
    check_control(control, where);
    object.required("default", [&](const auto& value, const auto& place) { take_default(value, place, control); });
    std::optional<std::array<double, 2>> usual;  // for sounds and planners, which this library does not have
    object.value("usual", usual);
    object.finish();
    if (!usual) return;
    const auto [low, high] = *usual;
    check_manifest(control.kind == Kind::curve && control.allows(low) && control.allows(high) && low < high,
                   where + ".usual: only for a curve: two numbers in its range, the lower one first");
}

void read_stage(const Json& json, const std::string& where, Stage& stage) {
    Object object(json, where);
    object.required_value("name", stage.name);
    object.required_value("weights", stage.weights);
    take_rows(object, "inputs", stage.inputs, read_input);
    take_rows(object, "outputs", stage.outputs, read_output);
    object.required("lowest", [&](const auto& value, const auto& place) {
        constexpr std::pair<const char*, const char*> precisions[] = {
            {"fp32", "fp32"}, {"bf16", "bf16"}, {"fp16", "fp16"}};
        take_word(value, place, precisions, stage.lowest);
    });
    object.required_value("batch", stage.batch);
    std::optional<std::int64_t> deep;
    object.value("deep", deep);
    object.finish();
    stage.deep = deep.value_or(0);
    if (deep) {
        const auto place = where + ".deep=" + std::to_string(*deep) + ": ";
        check_manifest(*deep >= 1 && *deep <= max_deep, place + "a whole number from 1 to " + std::to_string(max_deep));
        check_manifest(!stage.variants().empty(), place + "only for a denoising stage");
    }
    check_manifest(is_ascii(stage.name) && is_identifier(stage.name),
                   where + ".name='" + stage.name + "': letters, digits and _");
}

}  // namespace higen::core
