#include "pipeline.h"

#include <algorithm>
#include <cmath>

#include "conditioning.h"
#include "errors.h"
#include "noise.h"

namespace higen::core {
namespace {

// Frames decoded at a time: memory does not grow with the length of the clip.
constexpr std::size_t decode_chunk = 2;

std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(n); }

}  // namespace

void Pipeline::prepare() const {
    for (const auto name : {"text_encoder", "conditioner", "spatial_unet", "temporal_unet", "vae_decoder"})
        backend_.prepare(stage(name));
}

TensorPtr Pipeline::floats(Shape shape, std::vector<float> values) const {
    return backend_.from_host(Array::of(std::move(shape), std::move(values)));
}

TensorPtr Pipeline::encode_text(const std::vector<std::int64_t>& tokens, Cancellation& cancellation) const {
    const auto ids = backend_.from_host(Array::of({1, size(tokens.size())}, tokens));
    return backend_.run(stage("text_encoder"), {{"tokens", ids}}, cancellation).at("hidden");
}

// The denoising stages' inputs that do not change over the steps.
Tensors Pipeline::conditions(const TensorPtr& hidden, const TensorPtr& empty, const TensorPtr& motion,
                             const TensorPtr& appearance, Cancellation& cancellation) const {
    const auto run = [&](const TensorPtr& text) {
        return backend_.run(stage("conditioner"), {{"hidden", text}, {"motion", motion}, {"appearance", appearance}},
                            cancellation);
    };
    auto given = run(hidden);
    given.emplace("empty_context", run(empty).at("context"));
    return given;
}

TensorPtr Pipeline::denoise(std::string_view name, TensorPtr latents, const std::vector<SolverRow>& table,
                            float guidance, Tensors inputs, const OnStep& on_step, Cancellation& cancellation) const {
    const auto column = [&](double value) { return floats({1}, {static_cast<float>(value)}); };
    auto previous = floats(latents->shape(), std::vector<float>(count(latents->shape()), 0.0F));
    inputs["guidance"] = floats({1}, {guidance});
    for (std::size_t i = 0; i < table.size(); ++i) {
        cancellation.check();
        const auto& row = table[i];
        inputs["latents"] = latents;
        inputs["previous"] = previous;
        inputs["t"] = backend_.from_host(Array::of({1}, std::vector<std::int64_t>{row.t}));
        inputs["A"] = column(row.A);
        inputs["B"] = column(row.B);
        inputs["C"] = column(row.C);
        inputs["alpha"] = column(row.alpha);
        inputs["sigma"] = column(row.sigma);
        const auto outputs = backend_.run(stage(name), inputs, cancellation);
        for (const auto& [output, tensor] : outputs)
            if (tensor->shape() != latents->shape())
                fail_backend(std::string(name) + " gave " + output + " of the shape " + to_text(tensor->shape()));
        latents = outputs.at("latents");
        previous = outputs.at("previous");
        on_step({name, i, table.size(), row.t, *previous});
    }
    return latents;
}

void Pipeline::generate(const Request& request, const OnStep& on_step, const OnFrames& on_frames,
                        Cancellation& cancellation) const {
    const auto& unet = config_.unet;
    const auto factor = static_cast<std::size_t>(config_.autoencoder.factor);
    const auto channels = static_cast<std::size_t>(unet.in_channels);
    const std::size_t height = request.height / factor, width = request.width / factor, plane = height * width;
    const Shape image = {1, size(channels), size(height), size(width)};
    const auto video = [&](std::size_t frames) {
        return Shape{1, size(channels), size(frames), size(height), size(width)};
    };

    if (!request.key_frame.empty()) backend_.prepare(stage("vae_encoder"));
    const auto hidden = encode_text(request.tokens, cancellation);
    const auto empty = encode_text(request.negative_tokens, cancellation);

    // The key frame: drawn from the text, with no prior, motion 0 and appearance 1; or the caller's.
    Array key;
    if (request.key_frame.empty()) {
        const auto motion = motion_cue(CueValues::number(0.0), 1, static_cast<std::size_t>(unet.base_channels));
        const auto appearance =
            appearance_cue(CueValues::number(0.0), 1, static_cast<std::size_t>(unet.appearance_columns));
        auto given = conditions(hidden, empty, floats({1, 1, unet.base_channels}, motion),
                                floats({1, 1, unet.appearance_columns}, appearance), cancellation);
        auto noise = floats(video(1), initial_noise(request.seed, Purpose::spatial, channels, 1, height, width));
        const auto table = solver_table(request.solver, request.steps[0], config_.schedule);
        key = backend_.to_host(*denoise("spatial_unet", std::move(noise), table, request.guidance[0], std::move(given),
                                        on_step, cancellation));
    } else {
        auto pixels = floats({1, 3, size(request.height), size(request.width)}, request.key_frame);
        key = backend_.to_host(
            *backend_.run(stage("vae_encoder"), {{"pixels", std::move(pixels)}}, cancellation).at("latents"));
    }
    if (key.floats().size() != channels * plane)
        fail_backend("the key frame's latents have the shape " + to_text(key.shape));
    if (request.frames == 1) {
        key.shape = video(1);
        decode(*backend_.from_host(std::move(key)), on_frames, cancellation);
        return;
    }

    // The video: the key frame's latents are the prior of every frame.
    const auto frames = request.frames;
    const Shape motion = {1, size(frames), unet.base_channels}, appearance = {1, size(frames), unet.appearance_columns};
    auto given = conditions(hidden, empty, floats(motion, request.motion), floats(appearance, request.appearance),
                            cancellation);
    key.shape = image;
    given.emplace("prior", backend_.from_host(std::move(key)));
    auto noise = initial_noise(request.seed, Purpose::temporal, channels, frames, height, width);
    const auto offset = normal(request.seed, Purpose::temporal_offset, frames * channels);
    for (std::size_t c = 0; c < channels; ++c)
        for (std::size_t f = 0; f < frames; ++f)
            for (std::size_t i = 0; i < plane; ++i)
                noise[(c * frames + f) * plane + i] += request.offset_noise * offset[f * channels + c];
    const auto table = solver_table(request.solver, request.steps[1], config_.schedule);
    const auto latents = denoise("temporal_unet", floats(video(frames), std::move(noise)), table, request.guidance[1],
                                 std::move(given), on_step, cancellation);
    decode(*latents, on_frames, cancellation);
}

void Pipeline::decode(const Tensor& latents, const OnFrames& on_frames, Cancellation& cancellation) const {
    const auto z = backend_.to_host(latents);
    const auto channels = static_cast<std::size_t>(z.shape[1]), frames = static_cast<std::size_t>(z.shape[2]);
    const auto height = static_cast<std::size_t>(z.shape[3]), width = static_cast<std::size_t>(z.shape[4]);
    const auto factor = static_cast<std::size_t>(config_.autoencoder.factor);
    const std::size_t plane = height * width, pixels = plane * factor * factor;
    for (std::size_t first = 0; first < frames; first += decode_chunk) {
        cancellation.check();
        const auto chunk = std::min(decode_chunk, frames - first);
        std::vector<float> images(chunk * channels * plane);
        for (std::size_t f = 0; f < chunk; ++f)
            for (std::size_t c = 0; c < channels; ++c)
                std::copy_n(z.floats().data() + (c * frames + first + f) * plane, plane,
                            images.data() + (f * channels + c) * plane);
        auto input = floats({size(chunk), size(channels), size(height), size(width)}, std::move(images));
        const auto decoded = backend_.to_host(
            *backend_.run(stage("vae_decoder"), {{"latents", std::move(input)}}, cancellation).at("pixels"));
        if (decoded.shape != Shape{size(chunk), 3, size(height * factor), size(width * factor)})
            fail_backend("vae_decoder gave pixels " + to_text(decoded.shape));
        std::vector<std::uint8_t> rgb(chunk * pixels * 3);
        for (std::size_t f = 0; f < chunk; ++f)
            to_rgb(decoded.floats().data() + f * 3 * pixels, pixels, rgb.data() + f * 3 * pixels);
        on_frames({rgb, first, chunk, frames});
    }
}

void to_rgb(const float* pixels, std::size_t plane, std::uint8_t* rgb) {
    for (std::size_t i = 0; i < plane; ++i)
        for (std::size_t c = 0; c < 3; ++c) {
            const float x = pixels[c * plane + i];
            if (!std::isfinite(x)) fail_backend("a frame has NaN or infinite pixels; use a wider precision");
            const float unit = std::clamp(x * 0.5F + 0.5F, 0.0F, 1.0F);
            rgb[3 * i + c] = static_cast<std::uint8_t>(unit * 255.0F);
        }
}

}  // namespace higen::core
