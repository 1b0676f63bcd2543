#include "sampler.h"

#include <algorithm>
#include <array>
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

// Fresh noise for a row. A stochastic first-order solver takes it as `previous`.
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

// Add the frames of a window to those of the clip, weighted.
void mix(const Array& window, std::size_t start, const std::vector<float>& weights, const Shape& shape,
         std::vector<float>& clip) {
    const auto rows = size(shape[0] * shape[1]), frames = size(shape[2]), plane = size(shape[3] * shape[4]);
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t f = 0; f < weights.size(); ++f)
            for (std::size_t i = 0; i < plane; ++i)
                clip[(r * frames + start + f) * plane + i] +=
                    weights[f] * window.floats()[(r * weights.size() + f) * plane + i];
}

// Inputs of a step, sorted by whether they have an axis that the clip is cut along.
struct Cuttable {
    Tensors shared;  // the same for every part
    std::map<std::string, Array, std::less<>> clips;
};

Cuttable cuttable(const LoopRun& run, const Tensors& inputs, const std::vector<const char*>& along) {
    Cuttable found;
    for (const auto& [name, tensor] : inputs) {
        const auto& axes = run.stage.input(name)->shape;
        const bool has = std::any_of(along.begin(), along.end(),
                                     [&](const char* symbol) { return axis_of(axes, symbol) < axes.size(); });
        if (has)
            found.clips.emplace(name, tensor->to_host());
        else
            found.shared.emplace(name, tensor);
    }
    return found;
}

// An input's part along an axis; the whole input if it does not have the axis.
Array part_of(const LoopRun& run, std::string_view name, const Array& clip, const char* symbol, std::size_t start,
              std::size_t length) {
    const auto& axes = run.stage.input(name)->shape;
    const auto axis = axis_of(axes, symbol);
    return axis == axes.size() ? clip : cut(clip, axis, start, length);
}

// An input's part along a side of `cells` latent cells, or along the same side in pixels.
Array tile_of(const LoopRun& run, std::string_view name, const Array& clip, std::pair<const char*, const char*> side,
              std::size_t cells, std::size_t start, std::size_t length) {
    auto part = part_of(run, name, clip, side.first, start, length);
    const auto& axes = run.stage.input(name)->shape;
    const auto pixels = axis_of(axes, side.second);
    if (pixels == axes.size()) return part;
    const auto factor = size(part.shape[pixels]) / cells;
    return cut(part, pixels, factor * start, factor * length);
}

Tensors as_tensors(std::map<std::string, std::vector<float>, std::less<>> mixed, const Shape& shape) {
    Tensors outputs;
    for (auto& [name, values] : mixed) outputs.emplace(name, floats(shape, std::move(values)));
    return outputs;
}

using Weighted = std::vector<std::pair<std::size_t, std::vector<float>>>;

// Where the tiles along one side begin, and the weights of their cells.
Weighted tile_weights(std::size_t side, std::int64_t length, std::int64_t stride) {
    const auto whole = static_cast<std::int64_t>(side);
    return window_weights(side, {std::min(whole, length), std::min(whole, stride)});
}

// Add a tile to its place in the frames, weighted.
void mix_tile(const Array& tile, std::size_t top, const std::vector<float>& down, std::size_t left,
              const std::vector<float>& across, const Shape& shape, std::vector<float>& frames) {
    const auto planes = size(shape[0] * shape[1] * shape[2]), height = size(shape[3]), width = size(shape[4]);
    std::size_t at = 0;
    for (std::size_t p = 0; p < planes; ++p)
        for (std::size_t y = 0; y < down.size(); ++y)
            for (std::size_t x = 0; x < across.size(); ++x)
                frames[(p * height + top + y) * width + left + x] += down[y] * across[x] * tile.floats()[at++];
}

// A step on whole frames, or on tiles; the tiles' outputs are mixed as those of windows are.
Tensors run_tiles(Backend& backend, const LoopRun& run, const Tensors& inputs, Cancellation& cancellation) {
    const auto shape = inputs.at("latents")->shape();
    if (!run.tiles || (shape[3] <= run.tiles->height && shape[4] <= run.tiles->width))
        return backend.run(run.stage, inputs, cancellation);
    const auto given = cuttable(run, inputs, {"H", "W", "Y", "X"});
    std::map<std::string, std::vector<float>, std::less<>> mixed;
    for (const auto& [top, down] : tile_weights(size(shape[3]), run.tiles->height, run.tiles->stride))
        for (const auto& [left, across] : tile_weights(size(shape[4]), run.tiles->width, run.tiles->stride)) {
            cancellation.check();
            auto part = given.shared;
            for (const auto& [name, clip] : given.clips) {
                const auto rows = tile_of(run, name, clip, {"H", "Y"}, size(shape[3]), top, down.size());
                part.emplace(name,
                             host_tensor(tile_of(run, name, rows, {"W", "X"}, size(shape[4]), left, across.size())));
            }
            auto tile = shape;
            tile[3] = static_cast<std::int64_t>(down.size());
            tile[4] = static_cast<std::int64_t>(across.size());
            const auto outputs = backend.run(run.stage, part, cancellation);
            check_state(run, outputs, tile);
            for (const auto& [name, tensor] : outputs) {
                auto& frames = mixed.try_emplace(name, count(shape), 0.0F).first->second;
                mix_tile(tensor->to_host(), top, down, left, across, shape, frames);
            }
        }
    return as_tensors(std::move(mixed), shape);
}

// A step on windows of a clip's frames. Mixing the steps equals a step with the mixed prediction, because a step is
// linear in the prediction and a frame's weights sum to one.
Tensors run_windows(Backend& backend, const LoopRun& run, const Tensors& inputs, Cancellation& cancellation) {
    const auto shape = inputs.at("latents")->shape();
    if (!run.windows || shape[2] <= run.windows->length) return run_tiles(backend, run, inputs, cancellation);
    const auto length = size(run.windows->length);
    const auto given = cuttable(run, inputs, {"F"});
    std::map<std::string, std::vector<float>, std::less<>> mixed;
    for (const auto& [start, weights] : window_weights(size(shape[2]), *run.windows)) {
        auto part = given.shared;
        for (const auto& [name, clip] : given.clips)
            part.emplace(name, host_tensor(part_of(run, name, clip, "F", start, length)));
        auto window = shape;
        window[2] = run.windows->length;
        const auto outputs = run_tiles(backend, run, part, cancellation);
        check_state(run, outputs, window);
        for (const auto& [name, tensor] : outputs) {
            auto& clip = mixed.try_emplace(name, count(shape), 0.0F).first->second;
            mix(tensor->to_host(), start, weights, shape, clip);
        }
    }
    return as_tensors(std::move(mixed), shape);
}

// A step on a batch of texts with different numbers of tokens. A result must not depend on the other prompts, so
// samples with equal numbers are run together, and the padding behind shorter texts is cut off.
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
// `is_last`: where the mask is 1 the result is exactly the known latents, because a solver may end at a noise level
// above 0.
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
    for (std::size_t i = 0; i < moved.size(); ++i) {
        const auto weight = edit.weight(shape, i);
        const float change = weight * (edit.known.floats()[i] - wanted[i]);
        wanted[i] += change;
        moved[i] = is_last && weight == 1.0F ? edit.known.floats()[i] : moved[i] + push * change;
    }
    latents = host_tensor(std::move(x));
    previous = host_tensor(std::move(x0));
}

// Latents stretched after the last row. The factor falls to 1 where frames are known: these stay as they are.
TensorPtr stretched(const Stretching& stretch, const std::optional<Edit>& edit, const TensorPtr& latents) {
    auto x = latents->to_host();
    auto& values = std::get<0>(x.values);
    const float more = stretch.by - 1.0F;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const auto known = edit ? edit->weight(x.shape, i) : 0.0F;
        if (edit && known == 1.0F) continue;
        values[i] = stretch.from[i] + (1.0F + (1.0F - known) * more) * (values[i] - stretch.from[i]);
    }
    return host_tensor(std::move(x));
}

}  // namespace

float Edit::weight(const Shape& shape, std::size_t i) const {
    const auto& axes = mask.shape;
    const auto channels = size(shape[1]), frames = size(shape[2]), height = size(shape[3]), width = size(shape[4]);
    const auto column = axes[4] == 1 ? 0 : i % width, line = axes[3] == 1 ? 0 : i / width % height;
    const auto frame = i / (width * height) % frames, sample = i / (width * height * frames * channels);
    return mask.floats()[((sample * frames + frame) * size(axes[3]) + line) * size(axes[4]) + column];
}

TensorPtr denoise(Backend& backend, const LoopRun& run, TensorPtr latents, const OnStep& on_step,
                  Cancellation& cancellation) {
    const auto shape = latents->shape();
    const auto rows = tail(run.table, static_cast<std::int64_t>(run.first)).rows;
    auto previous = floats(shape, std::vector<float>(count(shape), 0.0F));
    FeatureReuse reusing(backend, run.reuse);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        cancellation.check();
        const auto& row = rows[i];
        if (row.noise) previous = fresh_noise(run, shape, run.first + i);
        const bool guided = !run.outside || run.interval.holds(run.first + i, run.table.rows.size());
        const auto& now = guided ? run : *run.outside;
        const auto inputs = inputs_of(now, row, std::move(latents), std::move(previous));
        const auto& stage = run.reuse > 1 ? reusing.step(now.reuses, i) : now.stage;
        auto& runner = run.reuse > 1 ? reusing : backend;
        const auto outputs = run_groups(now, inputs, cancellation, [&](const Tensors& given) {
            return run_windows(runner, now, given, cancellation);
        });
        check_state(now, outputs, shape);
        latents = outputs.at("latents");
        previous = outputs.at("previous");
        if (run.edit) apply_edit(*run.edit, row, i + 1 == rows.size(), latents, previous);
        if (run.stretch && i + 1 == rows.size()) {
            latents = stretched(*run.stretch, run.edit, latents);
            previous = stretched(*run.stretch, run.edit, previous);
        }
        on_step({run.loop, stage.name, i, rows.size(), row.t, *previous});
    }
    return latents;
}

TensorPtr denoise_again(Backend& backend, LoopRun run, const Shape& shape, const NoiseOf& noise_of,
                        std::pair<double, double> level, const FreeInit& settings, const OnStep& on_step,
                        Cancellation& cancellation) {
    const auto purpose = run.purpose;
    auto stretch = std::move(run.stretch);
    run.stretch.reset();
    const auto iterations = size(settings.iterations), rows = run.table.rows.size();
    const std::array<std::size_t, 3> axes = {size(shape[2]), size(shape[3]), size(shape[4])};
    const auto whole_noise = [&](std::size_t iteration) {
        auto [unit, added] = noise_of(iteration);
        for (std::size_t i = 0; i < added.size(); ++i) unit[i] += added[i];
        return unit;
    };
    auto [unit, added] = noise_of(0);
    const auto first = whole_noise(0);
    auto state = initial_state(run.table, std::move(unit), added, {}, 0);
    for (std::size_t k = 0;; ++k) {
        run.purpose = again(purpose, k);
        if (k + 1 == iterations) run.stretch = std::move(stretch);
        const auto told = [&](const Step& step) {
            on_step({step.loop, step.stage, k * rows + step.index, iterations * rows, step.t, step.previous});
        };
        auto latents = denoise(backend, run, floats(shape, std::move(state)), told, cancellation);
        if (k + 1 == iterations) return latents;
        auto noisy = latents->to_host().floats();
        for (std::size_t i = 0; i < noisy.size(); ++i)
            noisy[i] = static_cast<float>(level.first) * noisy[i] + static_cast<float>(level.second) * first[i];
        state = initial_state(run.table, renewed(noisy, whole_noise(k + 1), axes, settings), {}, {}, 0);
    }
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
