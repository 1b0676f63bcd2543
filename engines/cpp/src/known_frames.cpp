// The part of Sources for frames that a request gives by index, and for masks (docs/manifest.md, "Known frames").
#include <algorithm>

#include "errors.h"
#include "sources.h"

namespace higen::core {
namespace {

std::int64_t signed_size(std::size_t n) { return static_cast<std::int64_t>(n); }

// The mean brightness of each latent cell of one frame [height, width].
std::vector<float> cell_means(const float* bright, std::size_t height, std::size_t width, std::size_t factor) {
    std::vector<float> means;
    for (std::size_t y = 0; y < height; y += factor)
        for (std::size_t x = 0; x < width; x += factor) {
            double sum = 0.0;
            for (std::size_t i = 0; i < factor; ++i)
                for (std::size_t j = 0; j < factor; ++j) sum += static_cast<double>(bright[(y + i) * width + x + j]);
            means.push_back(static_cast<float>(sum / static_cast<double>(factor * factor)));
        }
    return means;
}

// Joins arrays [1, ...] of all samples, with h and w of the largest. An array with one cell per frame is repeated.
Array joined(std::vector<Array> parts) {
    const auto largest = *std::max_element(parts.begin(), parts.end(), [](const Array& a, const Array& b) {
        return count(a.shape) < count(b.shape);
    });
    auto shape = largest.shape;
    shape[0] = signed_size(parts.size());
    std::vector<float> values;
    for (const auto& part : parts) {
        const auto times = count(largest.shape) / count(part.shape);
        for (const float value : part.floats()) values.insert(values.end(), times, value);
    }
    return Array::of(std::move(shape), std::move(values));
}

}  // namespace

// The frames of a picture, a clip or known frames, for a stage that takes them one by one: [n, 3, Y, X].
TensorPtr Sources::frames_of(const std::string& control, const Place& place) const {
    const auto& request = requests_[place.sample];
    const auto found = request.pictures.find(control);
    if (found == request.pictures.end()) fail_request(control + ": a stage of this request needs one");
    const auto total = found->second.size() / (3 * request.height * request.width);
    const Shape shape = {3, signed_size(total), signed_size(request.height), signed_size(request.width)};
    auto frames = Array::of(shape, found->second);
    if (manifest_.control(control)->kind == Control::Kind::clip)
        frames = cut(frames, 1, 0, std::min(total, place.frames));
    frames = as_video(frames);  // [3, n, Y, X] to [1, n, 3, Y, X]
    frames.shape.erase(frames.shape.begin());
    return host_tensor(std::move(frames));
}

// Values of a control's frames [1, C, n, ...] at their places in the clip, [1, C, F, ...], else `elsewhere`.
Array Sources::placed(const Array& values, const std::string& control, const Place& place, float elsewhere) const {
    const auto& places = requests_[place.sample].places.at(control);
    if (values.shape.size() < 3 || values.shape[0] != 1 || values.shape[2] != signed_size(places.size()))
        fail_backend(to_text(values.shape) + " for the " + std::to_string(places.size()) + " frames of " + control);
    auto shape = values.shape;
    shape[2] = signed_size(place.frames);
    const auto plane = count({shape.begin() + 3, shape.end()});
    std::vector<float> made(count(shape), elsewhere);
    for (std::size_t c = 0; c < static_cast<std::size_t>(shape[1]); ++c)
        for (std::size_t i = 0; i < places.size(); ++i)
            if (places[i] < place.frames)
                std::copy_n(values.floats().data() + (c * places.size() + i) * plane, plane,
                            made.data() + (c * place.frames + places[i]) * plane);
    return Array::of(std::move(shape), std::move(made));
}

// The pictures of a control at their places, black elsewhere: [1, 3, F, Y, X]; or 1 at these places: [1, F].
TensorPtr Sources::placed_frames(const Source& source, const Place& place) const {
    const auto& request = requests_[place.sample];
    const auto found = request.pictures.find(source.name);
    if (found == request.pictures.end()) fail_request(source.name + ": a stage of this request needs one");
    const auto n = request.places.at(source.name).size();
    if (source.kind == Source::Kind::places) {
        auto made = placed(Array::of({1, 1, signed_size(n)}, std::vector<float>(n, 1.0F)), source.name, place);
        made.shape.erase(made.shape.begin());
        return host_tensor(std::move(made));
    }
    const Shape shape = {1, 3, signed_size(n), signed_size(request.height), signed_size(request.width)};
    return host_tensor(placed(Array::of(shape, found->second), source.name, place, -1.0F));
}

std::optional<Edit> Sources::known(const Loop& loop) {
    if (!requests_.front().passes(loop)) return std::nullopt;
    std::vector<Array> latents, masks;
    for (std::size_t i = 0; i < requests_.size(); ++i) {
        auto edit = known(Place{i, loop.frames_of(requests_[i].frames), &loop, false});
        latents.push_back(std::move(edit.known));
        masks.push_back(std::move(edit.mask));
    }
    return Edit{joined(std::move(latents)), joined(std::move(masks))};
}

// The known frames of one sample, [1, C, f, H, W], and a mask: how far each latent cell is known, from 0 to 1.
Edit Sources::known(const Place& place) {
    const auto& request = requests_[place.sample];
    const auto& row = *place.loop->known;
    auto latents = value(row.latents, std::vector<Axis>(5), place)->to_host();
    const auto& places = request.places.at(row.control);
    const auto& shape = latents.shape;
    if (shape.size() != 5 || shape[0] != 1 || shape[2] != signed_size(place.frames))
        fail_backend(to_text(row.latents) + " gave " + to_text(shape) + " for " + std::to_string(places.size()) +
                     " frames");
    const auto plane = static_cast<std::size_t>(shape[3] * shape[4]);
    const auto mask = row.mask.empty() ? request.pictures.end() : request.pictures.find(row.mask);
    const bool masked = mask != request.pictures.end();
    const auto cells = masked ? plane : 1;
    std::vector<float> known(place.frames * cells, 0.0F);
    const auto pixels = request.height * request.width;
    for (const auto at : places) {
        auto* weights = known.data() + at * cells;
        std::fill_n(weights, cells, 1.0F);
        if (!masked) continue;
        const auto frame = mask->second.size() == pixels ? 0 : at;
        const auto anew = cell_means(mask->second.data() + frame * pixels, request.height, request.width,
                                     static_cast<std::size_t>(manifest_.sizes.factor));
        for (std::size_t i = 0; i < cells; ++i) weights[i] -= anew[i];
    }
    auto mask_of_cells = Array::of({1, 1, shape[2], masked ? shape[3] : 1, masked ? shape[4] : 1}, std::move(known));
    return {std::move(latents), std::move(mask_of_cells)};
}

// A stage's input of known frames: their latents, or how far they are known. Zeros where nothing is known.
TensorPtr Sources::known_input(const std::string& name, const std::vector<Axis>& shape, const Place& place) {
    Shape sizes;
    for (const auto& axis : shape) sizes.push_back(size_of(axis, place));
    std::vector<float> values(count(sizes), 0.0F);
    if (place.loop != nullptr && requests_[place.sample].passes(*place.loop)) {
        const auto edit = known(place);
        const auto& mask = edit.mask.floats();
        const auto cells = mask.size() / place.frames;
        if (name == "latents") {
            if (edit.known.shape != sizes)
                fail_backend("known latents are " + to_text(edit.known.shape) + ", " + to_text(sizes) + " are wanted");
            const auto plane = static_cast<std::size_t>(sizes[3] * sizes[4]);
            for (std::size_t i = 0; i < values.size(); ++i) {
                const auto frame = i / plane % place.frames;
                const float weight = mask[frame * cells + (cells == 1 ? 0 : i % plane)];
                values[i] = weight > 0 ? edit.known.floats()[i] : 0.0F;
            }
        } else {
            const auto own = values.size() / place.frames;  // cells per frame in this input
            for (std::size_t i = 0; i < values.size(); ++i) {
                const auto* frame = mask.data() + i / own * cells;
                values[i] = own == 1 ? *std::min_element(frame, frame + cells) : frame[cells == 1 ? 0 : i % own];
            }
        }
    }
    return host_tensor(Array::of(std::move(sizes), std::move(values)));
}

}  // namespace higen::core
