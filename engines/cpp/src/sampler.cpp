#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "errors.h"
#include "noise.h"
#include "sources.h"

namespace higen::core {
namespace {

TensorPtr floats(Shape shape, std::vector<float> values) {
    return host_tensor(Array::of(std::move(shape), std::move(values)));
}

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// Fresh noise of a row, which a stochastic first-order solver takes as `previous`.
TensorPtr fresh_noise(const LoopRun& run, const Shape& shape, std::size_t row) {
    std::vector<float> numbers;
    for (const auto seed : run.seeds) {
        const auto own =
            frame_noise(seed, row_purpose(run.purpose, row), size(shape[1]), size(shape[2]), size(shape[3] * shape[4]));
        numbers.insert(numbers.end(), own.begin(), own.end());
    }
    return floats(shape, std::move(numbers));
}

Tensors inputs_of(const LoopRun& run, const SolverRow& row, TensorPtr latents, TensorPtr previous) {
    auto inputs = run.conditions;
    const auto batch = latents->shape().front();
    const std::pair<const char*, double> columns[] = {{"t", row.t}, {"A", row.A},         {"B", row.B},
                                                      {"C", row.C}, {"alpha", row.alpha}, {"sigma", row.sigma}};
    for (const auto& [name, value] : columns)
        inputs[name] = floats({batch}, std::vector<float>(size(batch), static_cast<float>(value)));
    if (run.stage.input("guidance") != nullptr) inputs["guidance"] = host_tensor(run.guidance);
    inputs["latents"] = std::move(latents);
    inputs["previous"] = std::move(previous);
    return inputs;
}

void check_state(const LoopRun& run, const Tensors& outputs, const Shape& shape) {
    for (const auto& [name, tensor] : outputs)
        if (tensor->shape() != shape)
            fail_backend(run.stage.name + " gave " + name + " of the shape " + to_text(tensor->shape()));
}

// Add the frames of a window to those of the clip, by weight.
void mix(const Array& window, std::size_t start, const std::vector<float>& weights, const Shape& shape,
         std::vector<float>& clip) {
    const auto rows = size(shape[0] * shape[1]), frames = size(shape[2]), plane = size(shape[3] * shape[4]);
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t f = 0; f < weights.size(); ++f)
            for (std::size_t i = 0; i < plane; ++i)
                clip[(r * frames + start + f) * plane + i] +=
                    weights[f] * window.floats()[(r * weights.size() + f) * plane + i];
}

// A step on windows of a clip's frames. Mixing the steps equals stepping with the mixed prediction, because a step is
// linear in it and a frame's weights sum to one.
Tensors run_windows(Backend& backend, const LoopRun& run, const Tensors& inputs, Cancellation& cancellation) {
    const auto shape = inputs.at("latents")->shape();
    const auto length = size(run.windows->length);
    // What has no axis of frames is each window's as it is.
    Tensors shared;
    std::map<std::string, std::pair<std::size_t, Array>, std::less<>> clips;  // with the axis
    for (const auto& [name, tensor] : inputs) {
        const auto& axes = run.stage.input(name)->shape;
        const auto axis = axis_of(axes, "F");
        if (axis == axes.size())
            shared.emplace(name, tensor);
        else
            clips.emplace(name, std::pair(axis, tensor->to_host()));
    }
    std::map<std::string, std::vector<float>, std::less<>> mixed;
    for (const auto& [start, weights] : window_weights(size(shape[2]), *run.windows)) {
        auto part = shared;
        for (const auto& [name, clip] : clips)
            part.emplace(name, host_tensor(cut(clip.second, clip.first, start, length)));
        auto window = shape;
        window[2] = run.windows->length;
        const auto outputs = backend.run(run.stage, part, cancellation);
        check_state(run, outputs, window);
        for (const auto& [name, tensor] : outputs) {
            auto& clip = mixed.try_emplace(name, count(shape), 0.0F).first->second;
            mix(tensor->to_host(), start, weights, shape, clip);
        }
    }
    Tensors outputs;
    for (auto& [name, values] : mixed) outputs.emplace(name, floats(shape, std::move(values)));
    return outputs;
}

// A step on a batch whose texts have different numbers of tokens: a prompt's picture does not depend on the other
// prompts, so samples with as many are run together, and what was put behind a shorter text is cut off.
Tensors run_groups(const LoopRun& run, const Tensors& inputs, Cancellation& cancellation,
                   const std::function<Tensors(const Tensors&)>& step) {
    std::map<std::size_t, std::vector<std::size_t>> groups;
    for (std::size_t i = 0; i < run.tokens.size(); ++i) groups[run.tokens[i]].push_back(i);
    if (groups.size() < 2) return step(inputs);
    std::map<std::string, Array, std::less<>> host;
    for (const auto& [name, tensor] : inputs) host.emplace(name, tensor->to_host());
    std::map<std::string, std::vector<TensorPtr>, std::less<>> rows;
    for (const auto& [tokens, samples] : groups) {
        cancellation.check();
        Tensors part;
        for (const auto& [name, array] : host) {
            const auto& axes = run.stage.input(name)->shape;
            std::vector<TensorPtr> own;
            for (const auto sample : samples) {
                auto row = cut(array, 0, sample, 1);
                if (axis_of(axes, tokens_symbol) < axes.size()) row = cut(row, 1, 0, tokens);
                own.push_back(host_tensor(std::move(row)));
            }
            part.emplace(name, stacked(own));
        }
        for (const auto& [name, tensor] : step(part)) {
            const auto made = tensor->to_host();
            auto& all = rows[name];
            all.resize(run.tokens.size());
            for (std::size_t i = 0; i < samples.size(); ++i) all[samples[i]] = host_tensor(cut(made, 0, i, 1));
        }
    }
    Tensors outputs;
    for (const auto& [name, all] : rows) outputs.emplace(name, stacked(all));
    return outputs;
}

// The state as if the stage had estimated the edited clean latents. m enters x0 = alpha x - sigma m and
// x' = A x + B m + C previous; so x0* in place of x0 moves x' by B/-sigma (x0* - x0).
// `is_last`: the result is what is known for certain, for a solver may end at a noise level above 0.
void apply_edit(const Edit& edit, const SolverRow& row, bool is_last, TensorPtr& latents, TensorPtr& previous) {
    auto x = latents->to_host(), x0 = previous->to_host();
    const auto& shape = x.shape;
    const auto& mask = edit.mask.shape;
    const bool fits = edit.known.shape == shape && mask.size() == 5 && mask[0] == shape[0] && mask[1] == 1 &&
                      mask[2] == shape[2] && (mask[3] == shape[3] || mask[3] == 1) &&
                      (mask[4] == shape[4] || mask[4] == 1);
    if (!fits)
        fail_backend("an edit of latents " + to_text(shape) + " has known " + to_text(edit.known.shape) + " and mask " +
                     to_text(mask));
    if (row.sigma == 0.0 && row.B != 0.0)
        fail_backend("an edit needs rows whose estimate depends on the network (sigma is 0)");
    const auto push = static_cast<float>(row.sigma == 0.0 ? 0.0 : row.B / -row.sigma);
    auto& moved = std::get<0>(x.values);
    auto& wanted = std::get<0>(x0.values);
    const auto channels = size(shape[1]), frames = size(shape[2]), height = size(shape[3]), width = size(shape[4]);
    for (std::size_t i = 0; i < moved.size(); ++i) {
        const auto column = mask[4] == 1 ? 0 : i % width, line = mask[3] == 1 ? 0 : i / width % height;
        const auto frame = i / (width * height) % frames, sample = i / (width * height * frames * channels);
        const auto weight =
            edit.mask.floats()[((sample * frames + frame) * size(mask[3]) + line) * size(mask[4]) + column];
        const float change = weight * (edit.known.floats()[i] - wanted[i]);
        wanted[i] += change;
        moved[i] = is_last && weight == 1.0F ? edit.known.floats()[i] : moved[i] + push * change;
    }
    latents = host_tensor(std::move(x));
    previous = host_tensor(std::move(x0));
}

}  // namespace

TensorPtr denoise(Backend& backend, const LoopRun& run, TensorPtr latents, const OnStep& on_step,
                  Cancellation& cancellation) {
    const auto shape = latents->shape();
    const auto rows = tail(run.table, static_cast<std::int64_t>(run.first)).rows;
    const bool windowed = run.windows && shape[2] > run.windows->length;
    auto previous = floats(shape, std::vector<float>(count(shape), 0.0F));
    for (std::size_t i = 0; i < rows.size(); ++i) {
        cancellation.check();
        const auto& row = rows[i];
        if (row.noise) previous = fresh_noise(run, shape, run.first + i);
        const auto inputs = inputs_of(run, row, std::move(latents), std::move(previous));
        const auto outputs = run_groups(run, inputs, cancellation, [&](const Tensors& given) {
            return windowed ? run_windows(backend, run, given, cancellation)
                            : backend.run(run.stage, given, cancellation);
        });
        check_state(run, outputs, shape);
        latents = outputs.at("latents");
        previous = outputs.at("previous");
        if (run.edit) apply_edit(*run.edit, row, i + 1 == rows.size(), latents, previous);
        on_step({run.loop, run.stage.name, i, rows.size(), row.t, *previous});
    }
    return latents;
}

std::vector<float> initial_state(const SolverTable& table, std::vector<float> unit, const std::vector<float>& added,
                                 const std::vector<float>& clean, std::size_t first) {
    auto state = std::move(unit);
    if (clean.empty() && table.initial != 1.0)
        for (auto& x : state) x *= static_cast<float>(table.initial);
    for (std::size_t i = 0; i < added.size(); ++i) state[i] += added[i];
    if (clean.empty()) return state;
    const auto alpha = static_cast<float>(table.rows[first].start_alpha);
    const auto sigma = static_cast<float>(table.rows[first].start_sigma);
    for (std::size_t i = 0; i < state.size(); ++i) state[i] = alpha * clean[i] + sigma * state[i];
    return state;
}

std::size_t tail_row(std::size_t rows, double strength) {
    const auto part = std::floor(static_cast<double>(rows) * std::clamp(strength, 0.0, 1.0));
    return rows - std::max<std::size_t>(1, static_cast<std::size_t>(part));
}

std::vector<std::pair<std::size_t, std::vector<float>>> window_weights(std::size_t frames, const Windows& windows) {
    const auto length = size(windows.length), stride = size(windows.stride);
    std::vector<std::size_t> starts;
    for (std::size_t start = 0; start + length < frames; start += stride) starts.push_back(start);
    starts.push_back(frames - length);
    const auto hill = [&](std::size_t j) { return static_cast<double>(std::min(j + 1, length - j)); };
    std::vector<double> total(frames, 0.0);
    for (const auto start : starts)
        for (std::size_t j = 0; j < length; ++j) total[start + j] += hill(j);
    std::vector<std::pair<std::size_t, std::vector<float>>> weighted;
    for (const auto start : starts) {
        auto& weights = weighted.emplace_back(start, std::vector<float>()).second;
        for (std::size_t j = 0; j < length; ++j) weights.push_back(static_cast<float>(hill(j) / total[start + j]));
    }
    return weighted;
}

}  // namespace higen::core
