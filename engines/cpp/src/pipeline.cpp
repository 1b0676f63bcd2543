#include "pipeline.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "conditioning.h"
#include "errors.h"
#include "noise.h"

namespace higen::core {
namespace {

// Frames decoded at a time: memory does not grow with the length of the clip.
constexpr std::size_t decode_chunk = 2;

std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(n); }

TensorPtr floats(Shape shape, std::vector<float> values) {
    return host_tensor(Array::of(std::move(shape), std::move(values)));
}

// Arrays of floats [1, ...] one after another: [B, ...]. Throws a backend error where their shapes differ.
Array stacked(std::vector<Array> rows) {
    auto made = std::move(rows.front());
    const auto shape = made.shape;
    auto& values = std::get<0>(made.values);
    for (std::size_t i = 1; i < rows.size(); ++i) {
        if (rows[i].shape != shape)
            fail_backend("a stage gave " + to_text(rows[i].shape) + " for one video and " + to_text(shape) +
                         " for another");
        values.insert(values.end(), rows[i].floats().begin(), rows[i].floats().end());
    }
    made.shape.front() = size(rows.size());
    return made;
}

}  // namespace

void Pipeline::prepare() const {
    for (const auto name : {"text_encoder", "conditioner", "spatial_unet", "temporal_unet", "vae_decoder"})
        backend_.prepare(stage(name));
}

std::vector<Pipeline::Text> Pipeline::encode_texts(const std::vector<Request>& requests,
                                                   Cancellation& cancellation) const {
    std::map<std::vector<std::int64_t>, TensorPtr> encoded;  // each text once: the negative one is mostly the same
    const auto encode = [&](const std::vector<std::int64_t>& tokens) {
        auto& hidden = encoded[tokens];
        if (!hidden) {
            const auto ids = host_tensor(Array::of({1, size(tokens.size())}, tokens));
            hidden = backend_.run(stage("text_encoder"), {{"tokens", ids}}, cancellation).at("hidden");
        }
        return hidden;
    };
    std::vector<Text> texts;
    for (const auto& request : requests) texts.push_back({encode(request.tokens), encode(request.negative_tokens)});
    return texts;
}

// The denoising stages' inputs that do not change over the steps; each video's are made alone, so that they are its own.
Tensors Pipeline::conditions(const std::vector<Text>& texts, const std::vector<Cues>& cues,
                             Cancellation& cancellation) const {
    std::map<std::string, std::vector<Array>, std::less<>> rows;
    for (std::size_t i = 0; i < texts.size(); ++i) {
        const auto& [motion, appearance] = cues[i];
        const auto rows_of = [](const std::vector<float>& cue, std::int64_t columns) {
            return floats({1, size(cue.size()) / columns, columns}, cue);
        };
        const auto motion_tensor = rows_of(motion, config_.unet.base_channels);
        const auto appearance_tensor = rows_of(appearance, config_.unet.appearance_columns);
        const auto run = [&](const TensorPtr& text) {
            return backend_.run(stage("conditioner"),
                                {{"hidden", text}, {"motion", motion_tensor}, {"appearance", appearance_tensor}},
                                cancellation);
        };
        for (const auto& [name, tensor] : run(texts[i].given)) rows[name].push_back(tensor->to_host());
        rows["empty_context"].push_back(run(texts[i].empty).at("context")->to_host());
    }
    Tensors given;
    for (auto& [name, arrays] : rows) given.emplace(name, host_tensor(stacked(std::move(arrays))));
    return given;
}

TensorPtr Pipeline::denoise(std::string_view name, TensorPtr latents, const std::vector<SolverRow>& table,
                            std::vector<float> guidance, Tensors inputs, const OnStep& on_step,
                            Cancellation& cancellation) const {
    const auto batch = guidance.size();
    const Shape each = {size(batch)};
    const auto column = [&](double value) {
        return floats(each, std::vector<float>(batch, static_cast<float>(value)));
    };
    auto previous = floats(latents->shape(), std::vector<float>(count(latents->shape()), 0.0F));
    inputs["guidance"] = floats(each, std::move(guidance));
    for (std::size_t i = 0; i < table.size(); ++i) {
        cancellation.check();
        const auto& row = table[i];
        inputs["latents"] = latents;
        inputs["previous"] = previous;
        inputs["t"] = host_tensor(Array::of(each, std::vector<std::int64_t>(batch, row.t)));
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

// Key frames drawn from the texts, with no prior, motion 0 and appearance 1: latents [B, C, 1, H, W].
Array Pipeline::draw_keys(const std::vector<Request>& requests, const std::vector<Text>& texts, const OnStep& on_step,
                          Cancellation& cancellation) const {
    const auto& unet = config_.unet;
    const auto& first = requests.front();
    const auto factor = static_cast<std::size_t>(config_.autoencoder.factor);
    const auto channels = static_cast<std::size_t>(unet.in_channels);
    const std::size_t height = first.height / factor, width = first.width / factor;
    const Cues still = {motion_cue(CueValues::number(0.0), 1, static_cast<std::size_t>(unet.base_channels)),
                        appearance_cue(CueValues::number(0.0), 1, static_cast<std::size_t>(unet.appearance_columns))};
    std::vector<Array> noise;
    std::vector<float> guidance;
    for (const auto& request : requests) {
        noise.push_back(Array::of({1, size(channels), 1, size(height), size(width)},
                                  initial_noise(request.seed, Purpose::spatial, channels, 1, height, width)));
        guidance.push_back(request.guidance[0]);
    }
    return denoise("spatial_unet", host_tensor(stacked(std::move(noise))),
                   solver_table(first.solver, first.steps[0], config_.schedule), std::move(guidance),
                   conditions(texts, std::vector<Cues>(texts.size(), still), cancellation), on_step, cancellation)
        ->to_host();
}

// The callers' key frames: latents [B, C, H, W].
Array Pipeline::encode_keys(const std::vector<Request>& requests, Cancellation& cancellation) const {
    std::vector<Array> latents;
    for (const auto& request : requests) {
        const auto pixels = floats({1, 3, size(request.height), size(request.width)}, request.key_frame);
        latents.push_back(
            backend_.run(stage("vae_encoder"), {{"pixels", pixels}}, cancellation).at("latents")->to_host());
    }
    return stacked(std::move(latents));
}

void Pipeline::generate(const std::vector<Request>& requests, const OnStep& on_step, const OnFrames& on_frames,
                        Cancellation& cancellation) const {
    const auto& first = requests.front();
    const auto factor = static_cast<std::size_t>(config_.autoencoder.factor);
    const auto channels = static_cast<std::size_t>(config_.unet.in_channels);
    const std::size_t height = first.height / factor, width = first.width / factor, plane = height * width;
    const auto latents_of = [&](std::size_t frames) {
        return Shape{size(requests.size()), size(channels), size(frames), size(height), size(width)};
    };

    const bool drawn = first.key_frame.empty();
    if (!drawn) backend_.prepare(stage("vae_encoder"));
    const auto texts = encode_texts(requests, cancellation);
    auto key = drawn ? draw_keys(requests, texts, on_step, cancellation) : encode_keys(requests, cancellation);
    if (!key.is_float() || key.floats().size() != requests.size() * channels * plane)
        fail_backend("the key frame's latents have the shape " + to_text(key.shape));
    const auto frames = first.frames;
    if (frames == 1) {
        key.shape = latents_of(1);
        decode(HostTensor(std::move(key)), on_frames, cancellation);
        return;
    }

    // The video: the key frame's latents are the prior of every frame.
    std::vector<Cues> cues;
    std::vector<Array> noises;
    std::vector<float> guidance;
    for (const auto& request : requests) {
        cues.emplace_back(request.motion, request.appearance);
        guidance.push_back(request.guidance[1]);
        auto noise = initial_noise(request.seed, Purpose::temporal, channels, frames, height, width);
        const auto offset = normal(request.seed, Purpose::temporal_offset, frames * channels);
        for (std::size_t c = 0; c < channels; ++c)
            for (std::size_t f = 0; f < frames; ++f)
                for (std::size_t i = 0; i < plane; ++i)
                    noise[(c * frames + f) * plane + i] += request.offset_noise * offset[f * channels + c];
        noises.push_back(Array::of({1, size(channels), size(frames), size(height), size(width)}, std::move(noise)));
    }
    auto given = conditions(texts, cues, cancellation);
    key.shape = {size(requests.size()), size(channels), size(height), size(width)};
    given.emplace("prior", host_tensor(std::move(key)));
    const auto latents = denoise("temporal_unet", host_tensor(stacked(std::move(noises))),
                                 solver_table(first.solver, first.steps[1], config_.schedule), std::move(guidance),
                                 std::move(given), on_step, cancellation);
    decode(*latents, on_frames, cancellation);
}

void Pipeline::decode(const Tensor& latents, const OnFrames& on_frames, Cancellation& cancellation) const {
    const auto z = latents.to_host();
    const auto videos = static_cast<std::size_t>(z.shape[0]), channels = static_cast<std::size_t>(z.shape[1]);
    const auto frames = static_cast<std::size_t>(z.shape[2]);
    const auto height = static_cast<std::size_t>(z.shape[3]), width = static_cast<std::size_t>(z.shape[4]);
    const auto factor = static_cast<std::size_t>(config_.autoencoder.factor);
    const std::size_t plane = height * width, pixels = plane * factor * factor;
    // No few are of two videos, for a graph's rounding may depend on how many it is given: so a video's is its own.
    for (std::size_t video = 0; video < videos; ++video)
        for (std::size_t first = 0; first < frames; first += decode_chunk) {
            cancellation.check();
            const auto chunk = std::min(decode_chunk, frames - first);
            std::vector<float> images(chunk * channels * plane);
            for (std::size_t f = 0; f < chunk; ++f)
                for (std::size_t c = 0; c < channels; ++c)
                    std::copy_n(z.floats().data() + ((video * channels + c) * frames + first + f) * plane, plane,
                                images.data() + (f * channels + c) * plane);
            const auto input = floats({size(chunk), size(channels), size(height), size(width)}, std::move(images));
            const auto decoded =
                backend_.run(stage("vae_decoder"), {{"latents", input}}, cancellation).at("pixels")->to_host();
            if (decoded.shape != Shape{size(chunk), 3, size(height * factor), size(width * factor)})
                fail_backend("vae_decoder gave pixels " + to_text(decoded.shape));
            std::vector<std::uint8_t> rgb(chunk * pixels * 3);
            for (std::size_t f = 0; f < chunk; ++f)
                to_rgb(decoded.floats().data() + f * 3 * pixels, pixels, rgb.data() + f * 3 * pixels);
            on_frames({rgb, video, first, chunk, frames});
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
