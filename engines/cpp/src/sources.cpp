#include "sources.h"

#include <algorithm>
#include <cstring>

#include "encodings.h"
#include "errors.h"
#include "noise.h"
#include "pictures.h"

namespace higen::core {
namespace {

std::int64_t signed_size(std::size_t n) { return static_cast<std::int64_t>(n); }

TensorPtr floats(Shape shape, std::vector<float> values) {
    return host_tensor(Array::of(std::move(shape), std::move(values)));
}

// Whether two arrays have the same bits: NaN equals NaN, and 0 differs from -0.
bool same(const Array& a, const Array& b) {
    if (a.shape != b.shape || a.is_float() != b.is_float()) return false;
    return std::visit(
        [&](const auto& values) {
            const auto& others = std::get<std::decay_t<decltype(values)>>(b.values);
            return values.empty() || std::memcmp(values.data(), others.data(), values.size() * sizeof values[0]) == 0;
        },
        a.values);
}

// Whether two tensors are known to be equal: the same object, or equal host arrays.
bool same(const TensorPtr& a, const TensorPtr& b) {
    if (a == b) return true;
    const auto* first = dynamic_cast<const HostTensor*>(a.get());
    const auto* second = dynamic_cast<const HostTensor*>(b.get());
    return first != nullptr && second != nullptr && same(first->array(), second->array());
}

bool same(const Tensors& a, const Tensors& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& one, const auto& other) {
        return one.first == other.first && same(one.second, other.second);
    });
}

// Arrays joined along their first axis.
Array joined(std::vector<Array> parts) {
    auto made = std::move(parts.front());
    for (std::size_t i = 1; i < parts.size(); ++i) {
        const auto& part = parts[i];
        if (!std::equal(part.shape.begin() + 1, part.shape.end(), made.shape.begin() + 1, made.shape.end()) ||
            part.is_float() != made.is_float())
            fail_backend("a stage gave " + to_text(part.shape) + " for one sample and " + to_text(made.shape) +
                         " for another");
        made.shape.front() += part.shape.front();
        std::visit(
            [&](auto& values) {
                const auto& more = std::get<std::decay_t<decltype(values)>>(part.values);
                values.insert(values.end(), more.begin(), more.end());
            },
            made.values);
    }
    return made;
}

// A text [1, T, D], padded with zeros to this many tokens; `denoise` cuts them off again.
TensorPtr lengthened(const TensorPtr& text, std::int64_t tokens) {
    if (text->shape()[1] >= tokens) return text;
    auto longer = text->to_host();
    longer.shape[1] = tokens;
    std::get<0>(longer.values).resize(count(longer.shape), 0.0F);
    return host_tensor(std::move(longer));
}

}  // namespace

TensorPtr stacked(const std::vector<TensorPtr>& rows) {
    if (rows.size() == 1) return rows.front();
    std::vector<Array> arrays;
    for (const auto& row : rows) arrays.push_back(row->to_host());
    return host_tensor(joined(std::move(arrays)));
}

Array cut(const Array& array, std::size_t axis, std::size_t first, std::size_t count) {
    std::size_t before = 1, after = 1;
    for (std::size_t i = 0; i < array.shape.size(); ++i) {
        if (i < axis) before *= static_cast<std::size_t>(array.shape[i]);
        if (i > axis) after *= static_cast<std::size_t>(array.shape[i]);
    }
    const auto size = static_cast<std::size_t>(array.shape[axis]);
    auto shape = array.shape;
    shape[axis] = signed_size(count);
    return std::visit(
        [&](const auto& values) {
            std::decay_t<decltype(values)> kept;
            kept.reserve(before * count * after);
            for (std::size_t i = 0; i < before; ++i) {
                const auto from = values.begin() + static_cast<std::ptrdiff_t>((i * size + first) * after);
                kept.insert(kept.end(), from, from + static_cast<std::ptrdiff_t>(count * after));
            }
            return Array::of(shape, std::move(kept));
        },
        array.values);
}

Array as_video(const Array& frames) {
    const auto n = static_cast<std::size_t>(frames.shape[0]), channels = static_cast<std::size_t>(frames.shape[1]);
    const auto plane = static_cast<std::size_t>(frames.shape[2] * frames.shape[3]);
    std::vector<float> clip(frames.floats().size());
    for (std::size_t f = 0; f < n; ++f)
        for (std::size_t c = 0; c < channels; ++c)
            std::copy_n(frames.floats().data() + (f * channels + c) * plane, plane, clip.data() + (c * n + f) * plane);
    return Array::of({1, frames.shape[1], frames.shape[0], frames.shape[2], frames.shape[3]}, std::move(clip));
}

Tensors Sources::inputs(const Stage& stage, const Place& place) {
    Tensors values;
    for (const auto& tensor : stage.inputs)
        if (tensor.source.kind != Source::Kind::state)
            values.emplace(tensor.name, value(tensor.source, tensor.shape, place));
    return values;
}

Tensors Sources::batch(const Stage& stage, const Loop& loop) {
    std::map<std::string, std::vector<TensorPtr>, std::less<>> rows;
    for (std::size_t i = 0; i < requests_.size(); ++i) {
        const Place place{i, loop.frames_of(requests_[i].frames), &loop, false};
        for (auto& [name, tensor] : inputs(stage, place)) rows[name].push_back(tensor);
    }
    const auto sizes = tokens();
    const auto most = sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end());
    Tensors given;
    for (auto& [name, tensors] : rows) {
        const auto& axes = stage.input(name)->shape;
        if (most > 0 && axis_of(axes, tokens_symbol) < axes.size())
            for (auto& tensor : tensors) tensor = lengthened(tensor, signed_size(most));
        given.emplace(name, stacked(tensors));
    }
    return given;
}

std::vector<std::size_t> Sources::tokens() const {
    std::vector<std::size_t> sizes;
    if (has_chunks())
        for (const auto& request : requests_)
            sizes.push_back(std::max(request.tokens.size(), request.negative_tokens.size()));
    return sizes;
}

// A text, padded with empty chunks to as many chunks as the other text of its sample has.
Reading Sources::reading(const Source& source, const Place& place) const {
    const auto& request = requests_[place.sample];
    const bool negative = place.negative || source.name == "negative";
    Reading found{negative ? request.negative_tokens : request.tokens,
                  negative ? request.negative_weights : request.weights};
    if (!has_chunks()) return found;
    const auto wanted = std::max(request.tokens.size(), request.negative_tokens.size());
    while (found.ids.size() < wanted) found.ids.insert(found.ids.end(), request.blank.begin(), request.blank.end());
    found.weights.resize(wanted, 1.0F);
    return found;
}

TensorPtr Sources::latents(const Source& source, const Loop& loop) {
    const std::vector<Axis> shape(5);
    std::vector<TensorPtr> rows;
    for (std::size_t i = 0; i < requests_.size(); ++i) {
        rows.push_back(value(source, shape, {i, loop.frames_of(requests_[i].frames), &loop, false}));
        if (rows.back()->shape().size() != 5 || rows.back()->shape().front() != 1 || !rows.back()->is_float())
            fail_backend(to_text(source) + " gave " + to_text(rows.back()->shape()) +
                         ": latents [1, C, f, H, W] are wanted");
    }
    return stacked(rows);
}

void Sources::finish(const Loop& loop, TensorPtr latents) { latents_[loop.name] = latents->to_host(); }

TensorPtr Sources::value(const Source& source, const std::vector<Axis>& shape, const Place& place) {
    switch (source.kind) {
        case Source::Kind::text: {
            auto ids = reading(source, place).ids;
            const auto total = signed_size(ids.size()), rows = has_chunks() ? total / manifest_.text->length : 1;
            return host_tensor(Array::of({rows, total / rows}, std::move(ids)));
        }
        case Source::Kind::control: return control(source.name, shape, place);
        case Source::Kind::picture:
        case Source::Kind::clip:
            return place.given.empty() ? picture(source, shape, place) : frames_of(place.given, place);
        case Source::Kind::known: return known_input(source.name, shape, place);
        case Source::Kind::frames:
        case Source::Kind::places: return placed_frames(source, place);
        case Source::Kind::noise: return noise(source.purpose, shape, place);
        case Source::Kind::made:
            if (source.shown && !place.given.empty()) return frames_of(place.given, place);
            if (source.shown) return shown(source, shape, place);
            if (manifest_.loop(source.name) != nullptr) return of_loop(source.name, shape.size(), place);
            return of_stage(source, shape.size(), place);
        case Source::Kind::state: break;
    }
    throw Error(HIGEN_ERROR_INTERNAL, "the state has no value of its own");
}

std::int64_t Sources::size_of(const Axis& axis, const Place& place) const {
    if (axis.symbol.empty()) return axis.size;
    if (const auto fixed = manifest_.sizes.symbols.find(axis.symbol); fixed != manifest_.sizes.symbols.end())
        return fixed->second;
    const auto& request = requests_[place.sample];
    const auto factor = static_cast<std::size_t>(manifest_.sizes.factor);
    switch (axis.symbol.front()) {
        case 'F': return signed_size(place.frames);
        case 'Y': return signed_size(request.height);
        case 'X': return signed_size(request.width);
        case 'H': return signed_size(request.height / factor);
        case 'W': return signed_size(request.width / factor);
        default: return 1;  // B, N
    }
}

MaybeValue Sources::value_of(const Control& control, const Place& place) const {
    if (place.loop != nullptr)
        if (const auto own = place.loop->controls.find(control.name); own != place.loop->controls.end())
            return ControlValue::number(own->second);
    return requests_[place.sample].values.at(control.name);
}

TensorPtr Sources::control(const std::string& name, const std::vector<Axis>& shape, const Place& place) const {
    const auto repeated = [&](float number) {
        if (shape.size() == 1) return floats({1}, {number});
        return floats({1, signed_size(place.frames)}, std::vector<float>(place.frames, number));
    };
    if (name == "fps") return repeated(static_cast<float>(requests_[place.sample].fps));
    const auto& row = *manifest_.control(name);
    const auto value = value_of(row, place);
    // A value for all frames of the request is resampled for a loop of one frame.
    if (value) check_value(row, *value, std::max(place.frames, value->rows));
    const auto columns = static_cast<std::size_t>(size_of(shape.back(), place));
    auto numbers = encode(row, value, place.frames, columns);
    if (row.encoding == Control::Encoding::number) return repeated(numbers.front());
    Shape made = {1, signed_size(place.frames)};
    if (row.encoding != Control::Encoding::curve) made.push_back(signed_size(columns));
    return floats(std::move(made), std::move(numbers));
}

TensorPtr Sources::picture(const Source& source, const std::vector<Axis>& shape, const Place& place) const {
    const auto& request = requests_[place.sample];
    const auto given = request.pictures.find(source.name);
    if (given == request.pictures.end()) fail_request(source.name + ": a stage of this request needs one");
    const auto& pixels = given->second;
    const auto height = request.height, width = request.width, frames = pixels.size() / (3 * height * width);
    const Shape frame = {1, 3, signed_size(height), signed_size(width)};
    if (source.kind == Source::Kind::clip) {
        auto clip =
            cut(Array::of({3, signed_size(frames), frame[2], frame[3]}, pixels), 1, 0, std::min(frames, place.frames));
        if (shape.size() == 5) clip.shape.insert(clip.shape.begin(), 1);
        // [3, F, Y, X] to [F, 3, Y, X]
        if (shape.size() == 4) clip = as_video(clip), clip.shape.erase(clip.shape.begin());
        return host_tensor(std::move(clip));
    }
    if (!source.resampled) return floats(frame, pixels);
    if (shape.size() < 2) fail_backend(to_text(source) + ": the input has no two axes to resample to");
    return resampled(pixels, height, width, shape, place);
}

// A picture [3, height, width], resampled to the input's last two axes.
TensorPtr Sources::resampled(const std::vector<float>& pixels, std::size_t height, std::size_t width,
                             const std::vector<Axis>& shape, const Place& place) const {
    const auto new_height = size_of(shape[shape.size() - 2], place), new_width = size_of(shape.back(), place);
    return floats({1, 3, new_height, new_width}, resample(pixels, height, width, static_cast<std::size_t>(new_height),
                                                          static_cast<std::size_t>(new_width)));
}

// The first frame of a stage's pixels, rounded as if it had been written to a file and read again.
TensorPtr Sources::shown(const Source& source, const std::vector<Axis>& shape, const Place& place) {
    const auto made = run(manifest_.stage(source.name), place).at(source.output)->to_host();
    const auto rank = made.shape.size();
    if (!made.is_float() || (rank != 4 && rank != 5) || made.shape[1] != 3 || count(made.shape) == 0)
        fail_backend(to_text(source) + " is " + to_text(made.shape) + ": pixels are wanted");
    const auto height = static_cast<std::size_t>(made.shape[rank - 2]);
    const auto width = static_cast<std::size_t>(made.shape[rank - 1]), plane = height * width;
    std::vector<std::uint8_t> rgb(3 * plane);
    const auto stride = rank == 5 ? static_cast<std::size_t>(made.shape[2]) * plane : plane;
    to_rgb(made.floats().data(), plane, stride, rgb.data());
    auto pixels = planes(rgb, 1, plane);
    if (source.resampled) return resampled(pixels, height, width, shape, place);
    return floats({1, 3, made.shape[rank - 2], made.shape[rank - 1]}, std::move(pixels));
}

TensorPtr Sources::noise(std::uint64_t purpose, const std::vector<Axis>& shape, const Place& place) const {
    Shape sizes;
    for (const auto& axis : shape) sizes.push_back(size_of(axis, place));
    const auto frame_axis = axis_of(shape, "F");
    const auto split = std::min(frame_axis, shape.size());
    const bool has_frames = frame_axis < shape.size();
    const auto before = has_frames ? count({sizes.begin(), sizes.begin() + static_cast<std::ptrdiff_t>(split)}) : 1;
    const auto frames = has_frames ? static_cast<std::size_t>(sizes[frame_axis]) : 1;
    const auto total = count(sizes);
    return floats(sizes, frame_noise(requests_[place.sample].seed, purpose, before, frames, total / (before * frames)));
}

TensorPtr Sources::of_loop(const std::string& name, std::size_t rank, const Place& place) const {
    const auto found = latents_.find(name);
    if (found == latents_.end())
        fail_request("frames=" + std::to_string(requests_[place.sample].frames) + ": the loop " + name +
                     " is left out, but a later one needs its latents");
    auto own = cut(found->second, 0, place.sample, 1);
    if (rank == 4) {
        own = cut(own, 2, 0, 1);
        own.shape.erase(own.shape.begin() + 2);
    }
    return host_tensor(std::move(own));
}

TensorPtr Sources::of_stage(const Source& source, std::size_t rank, const Place& place) {
    auto branch = place;
    branch.negative = place.negative || source.negative;
    if (!source.given.empty()) branch.given = source.given;
    const auto& outputs = run(manifest_.stage(source.name), branch);
    const auto& made = outputs.at(source.output);
    if (rank != 5 || made->shape().size() != 4) return made;
    auto clip = as_video(made->to_host());
    if (requests_[place.sample].places.count(source.given) > 0) clip = placed(clip, source.given, place);
    return host_tensor(std::move(clip));
}

const Tensors& Sources::run(const Stage& stage, const Place& place) {
    auto given = inputs(stage, place);
    const auto text = std::find_if(stage.inputs.begin(), stage.inputs.end(),
                                   [](const auto& tensor) { return tensor.source.kind == Source::Kind::text; });
    const bool reads = has_chunks() && text != stage.inputs.end();
    const auto own = reads ? reading(text->source, place) : Reading();
    // Equal tokens can have different weights. No input can have a name with a blank.
    if (reads) given.emplace("their weights", floats({signed_size(own.weights.size())}, own.weights));
    auto& known = made_[stage.name];
    const auto found =
        std::find_if(known.begin(), known.end(), [&](const auto& one) { return same(one.inputs, given); });
    if (found != known.end()) return found->outputs;
    auto outputs = reads ? read(stage, *text, given, own) : call(stage, given);
    return known.emplace_back(Made{std::move(given), std::move(outputs)}).outputs;
}

// Run a stage that reads a text, one chunk at a time. Its outputs [1, L, D] are joined along the tokens.
Tensors Sources::read(const Stage& stage, const TensorSpec& text, Tensors inputs,
                      const Reading& reading) const {
    const auto length = static_cast<std::size_t>(manifest_.text->length);
    std::map<std::string, Array, std::less<>> whole;
    inputs.erase("their weights");
    const auto ids = inputs.at(text.name)->to_host();
    for (std::size_t first = 0; first < reading.ids.size(); first += length) {
        inputs[text.name] = host_tensor(cut(ids, 0, first / length, 1));
        for (const auto& [name, tensor] : backend_.run(stage, inputs, cancellation_)) {
            auto part = tensor->to_host();
            const bool fits = part.is_float() && part.shape.size() == 3 && part.shape[0] == 1;
            if (!fits || part.shape[1] != signed_size(length))
                fail_backend(stage.name + "." + name + ": " + to_text(part.shape) + " given, [1, " +
                             std::to_string(length) + ", D] wanted");
            apply_weights(part, reading.weights.data() + first);
            const auto [found, is_new] = whole.try_emplace(name, part);
            if (is_new) continue;
            found->second.shape[1] += part.shape[1];
            auto& values = std::get<0>(found->second.values);
            values.insert(values.end(), part.floats().begin(), part.floats().end());
        }
    }
    Tensors outputs;
    for (auto& [name, array] : whole) outputs.emplace(name, host_tensor(std::move(array)));
    return outputs;
}

// Run a stage for one sample. A stage over single frames (axis N) gets a chunk of them at a time.
Tensors Sources::call(const Stage& stage, const Tensors& inputs) const {
    const auto by_frame = [&](const TensorSpec& spec) {
        return !spec.shape.empty() && spec.shape.front().symbol == "N";
    };
    const auto chunk = static_cast<std::size_t>(manifest_.sizes.chunk);
    std::size_t total = 1;
    for (const auto& spec : stage.inputs)
        if (by_frame(spec) && spec.source.kind != Source::Kind::state)
            total = std::max(total, static_cast<std::size_t>(inputs.at(spec.name)->shape().front()));
    if (total <= chunk) return backend_.run(stage, inputs, cancellation_);
    std::map<std::string, std::vector<Array>, std::less<>> parts;
    for (std::size_t first = 0; first < total; first += chunk) {
        auto part = inputs;
        for (const auto& spec : stage.inputs)
            if (by_frame(spec))
                part[spec.name] =
                    host_tensor(cut(inputs.at(spec.name)->to_host(), 0, first, std::min(chunk, total - first)));
        for (const auto& [name, tensor] : backend_.run(stage, part, cancellation_))
            parts[name].push_back(tensor->to_host());
    }
    Tensors outputs;
    for (auto& [name, arrays] : parts) outputs.emplace(name, host_tensor(joined(std::move(arrays))));
    return outputs;
}

}  // namespace higen::core
