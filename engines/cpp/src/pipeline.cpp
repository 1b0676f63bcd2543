#include "pipeline.h"

#include <algorithm>

#include "errors.h"
#include "noise.h"
#include "pictures.h"

namespace higen::core {
namespace {

std::int64_t signed_size(std::size_t n) { return static_cast<std::int64_t>(n); }

bool is_one(const LoopOptions& options) {
    return std::all_of(options.guidance.begin(), options.guidance.end(), [](float scale) { return scale == 1.0F; });
}

// Latents in the shape [B, C, f, H, W] of a loop's state; a single frame is repeated for every frame.
std::vector<float> spread_latents(const Array& found, const Shape& shape, const Loop& loop) {
    if (found.shape == shape) return found.floats();
    auto single = shape;
    single[2] = 1;
    if (found.shape != single)
        fail_backend("the loop " + loop.name + " is fed latents " + to_text(found.shape) + ", its own are " +
                     to_text(shape));
    const auto rows = static_cast<std::size_t>(shape[0] * shape[1]), frames = static_cast<std::size_t>(shape[2]);
    const auto plane = static_cast<std::size_t>(shape[3] * shape[4]);
    std::vector<float> spread;
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t f = 0; f < frames; ++f)
            spread.insert(spread.end(), found.floats().begin() + static_cast<std::ptrdiff_t>(r * plane),
                          found.floats().begin() + static_cast<std::ptrdiff_t>((r + 1) * plane));
    return spread;
}

// Noise [C, f, ...] of one sample in an iteration of a loop. In a clip with windows, frames can take other frames'
// noise.
std::vector<float> ordered_noise(const Loop& loop, const Request& request, std::uint64_t purpose, const Shape& shape,
                                 std::size_t plane, const std::optional<Windows>& windows, std::size_t iteration) {
    const auto channels = static_cast<std::size_t>(shape[1]), frames = static_cast<std::size_t>(shape[2]);
    const auto stream = again(purpose, iteration);
    if (!windows) return frame_noise(request.seed, stream, channels, frames, plane);
    const auto order = frame_order(request.seed, again(loop.noise.purpose, iteration), frames,
                                   static_cast<std::size_t>(windows->length),
                                   static_cast<std::size_t>(windows->stride), windows->noise);
    const auto drawn = 1 + *std::max_element(order.begin(), order.end());
    const auto own = frame_noise(request.seed, stream, channels, drawn, plane);
    std::vector<float> noise;
    noise.reserve(channels * frames * plane);
    for (std::size_t c = 0; c < channels; ++c)
        for (const auto frame : order) {
            const auto from = own.begin() + static_cast<std::ptrdiff_t>((c * drawn + frame) * plane);
            noise.insert(noise.end(), from, from + static_cast<std::ptrdiff_t>(plane));
        }
    return noise;
}

// The unit noise [B, C, f, H, W] that a loop begins with.
std::vector<float> unit_noise(const Loop& loop, const std::vector<Request>& requests, const Shape& shape,
                              const std::optional<Windows>& windows, std::size_t iteration) {
    std::vector<float> unit;
    const auto plane = static_cast<std::size_t>(shape[3] * shape[4]);
    for (const auto& request : requests) {
        const auto own = ordered_noise(loop, request, loop.noise.purpose, shape, plane, windows, iteration);
        unit.insert(unit.end(), own.begin(), own.end());
    }
    return unit;
}

// What a loop's rule adds to the unit noise [B, C, f, H, W]; empty if it adds nothing.
std::vector<float> added_noise(const Loop& loop, const std::vector<Request>& requests, const Shape& shape,
                               Sources& sources, const std::optional<Windows>& windows, std::size_t iteration) {
    const auto& rule = loop.noise;
    std::vector<float> added;
    const auto channels = static_cast<std::size_t>(shape[1]), frames = static_cast<std::size_t>(shape[2]);
    const auto plane = static_cast<std::size_t>(shape[3] * shape[4]), one = channels * frames * plane;
    if (rule.offset) {
        added.resize(count(shape));
        for (std::size_t b = 0; b < requests.size(); ++b) {
            const auto scale = static_cast<float>(requests[b].number(rule.offset->scale));
            const auto numbers = ordered_noise(loop, requests[b], rule.offset->purpose, shape, 1, windows, iteration);
            for (std::size_t i = 0; i < one; ++i) added[b * one + i] = scale * numbers[i / plane];
        }
    }
    if (rule.mix) {
        const Source source{Source::Kind::made, rule.mix->loop, "latents"};
        const auto mixed = spread_latents(sources.latents(source, loop)->to_host(), shape, loop);
        added.resize(mixed.size());
        for (std::size_t i = 0; i < added.size(); ++i)
            added[i] += static_cast<float>(requests[i / one].number(rule.mix->scale)) * mixed[i];
    }
    return added;
}

// Pixels of a decoder's output, [N, 3, Y, X] or [1, 3, N, Y, X], as bytes of `count` frames from `first` on.
std::vector<std::uint8_t> to_frames(const Array& pixels, std::size_t first, std::size_t count) {
    const bool video = pixels.shape.size() == 5;
    const auto plane = static_cast<std::size_t>(pixels.shape[pixels.shape.size() - 2] * pixels.shape.back());
    const auto stride = video ? static_cast<std::size_t>(pixels.shape[2]) * plane : plane;
    std::vector<std::uint8_t> rgb(count * plane * 3);
    for (std::size_t f = 0; f < count; ++f)
        to_rgb(pixels.floats().data() + (first + f) * (video ? plane : 3 * plane), plane, stride,
               rgb.data() + f * 3 * plane);
    return rgb;
}

// A decoder's latents: frames [first, end) of one sample of [B, C, f, H, W], as [N, C, H, W] or [1, C, N, H, W].
Array chunk_of(const Array& sample, std::size_t first, std::size_t end, std::size_t rank) {
    auto chunk = cut(sample, 2, first, end - first);
    if (rank == 5) return chunk;
    // [C, N, H, W] to [N, C, H, W]: `as_video` swaps the axes, in either direction.
    chunk.shape.erase(chunk.shape.begin());
    auto frames = as_video(chunk);
    frames.shape.erase(frames.shape.begin());
    return frames;
}

}  // namespace

void Pipeline::prepare() const {
    const std::vector<Request> requests = {default_request(manifest_)};
    const auto prepare_all = [&](std::vector<std::string> names, const std::string& but) {
        for (const auto& name : names)
            if (name != but) backend_.prepare(manifest_.stage(name));
    };
    for (const auto* loop : manifest_.wanted(requests.front().frames)) {
        prepare_all(manifest_.feeding(requests.front().stand_ins(*loop)), "");
        if (!requests.front().runs(*loop)) continue;
        const auto stages = ways(index_of(*loop), requests);
        prepare_all(manifest_.feeding({stages.front()->name}), stages.front()->name);
        (void)backend_.choose(stages);
    }
    prepare_all(manifest_.feeding({manifest_.sizes.decoder}), "");
}

std::size_t Pipeline::index_of(const Loop& loop) const {
    return static_cast<std::size_t>(&loop - manifest_.loops.data());
}

// The stages that can do a loop's steps. If guidance is 1 everywhere, the plain stage comes first: it is half the work.
std::vector<const Stage*> Pipeline::ways(std::size_t index, const std::vector<Request>& requests) const {
    const auto pair = requests.front().pair(manifest_.loops[index]);
    const bool plain = std::all_of(requests.begin(), requests.end(),
                                   [&](const auto& request) { return is_one(request.loops[index]); });
    std::vector<const Stage*> stages;
    if (plain && !pair.plain.empty()) stages.push_back(&manifest_.stage(pair.plain));
    if (!pair.guided.empty()) stages.push_back(&manifest_.stage(pair.guided));
    return stages;
}

// The stages that can do a step without guidance: the plain one (half the work), or the guided one with guidance 1.
std::vector<const Stage*> Pipeline::unguided(const StagePair& pair) const {
    std::vector<const Stage*> stages;
    for (const auto& name : {pair.plain, pair.guided})
        if (!name.empty()) stages.push_back(&manifest_.stage(name));
    return stages;
}

// Choose and load the stage that does a step. If features are reused, its variants are loaded and stored in `reuses`.
const Stage& Pipeline::chosen(const std::vector<const Stage*>& ways, std::int64_t reuse, ReuseStages& reuses) const {
    if (reuse == 1) return backend_.choose(ways);
    std::vector<const Stage*> full;
    for (const auto* way : ways) full.push_back(&manifest_.stage(way->variants().front().name));
    reuses.full = &backend_.choose(full);
    const auto& stage = *ways[static_cast<std::size_t>(std::find(full.begin(), full.end(), reuses.full) - full.begin())];
    reuses.shallow = &manifest_.stage(stage.variants().back().name);
    backend_.prepare(*reuses.shallow);
    return stage;
}

// Load the stages for reuse before the work starts, because a model may lack some of these graphs.
void Pipeline::prepare_reuse(const std::vector<Request>& requests) const {
    const auto& first = requests.front();
    for (const auto* loop : manifest_.wanted(first.frames)) {
        const auto& settings = first.loops[index_of(*loop)].settings;
        if (settings.reuse == 1 || !first.runs(*loop)) continue;
        ReuseStages reuses;
        (void)chosen(ways(index_of(*loop), requests), settings.reuse, reuses);
        if (!settings.interval.whole() || first.inverts(*loop))
            (void)chosen(unguided(first.pair(*loop)), settings.reuse, reuses);
    }
}

std::int64_t Pipeline::channels(const Stage& stage) const {
    const auto& shape = stage.input("latents")->shape;
    if (shape.size() != 5) fail_backend(stage.name + ".latents: five axes are wanted, [B, C, f, H, W]");
    const auto fixed = manifest_.sizes.symbols.find(shape[1].symbol);
    const auto size = fixed == manifest_.sizes.symbols.end() ? shape[1].size : fixed->second;
    if (size < 1) fail_backend(stage.name + ".latents: its channels have no fixed size");
    return size;
}

// A loop's rows with guidance 1, done by the stage for it. The table is left empty.
LoopRun Pipeline::without_guidance(const LoopRun& run, const StagePair& pair, const Loop& loop,
                                   Sources& sources) const {
    ReuseStages reuses;
    const auto& stage = chosen(unguided(pair), run.reuse, reuses);
    auto ones = Array::of(run.guidance.shape, std::vector<float>(run.guidance.floats().size(), 1.0F));
    LoopRun made{loop.name, stage, sources.batch(stage, loop), {}, std::move(ones), {}};
    made.windows = run.windows, made.tiles = run.tiles, made.tokens = sources.tokens();
    made.reuse = run.reuse, made.reuses = reuses;
    return made;
}

TensorPtr Pipeline::run_loop(std::size_t index, const std::vector<Request>& requests, Sources& sources,
                             const OnStep& on_step, Cancellation& cancellation) const {
    const auto& loop = manifest_.loops[index];
    const auto& first = requests.front();
    const auto& options = first.loops[index];
    ReuseStages reuses;
    const auto& stage = chosen(ways(index, requests), options.settings.reuse, reuses);
    const auto factor = static_cast<std::size_t>(manifest_.sizes.factor), frames = loop.frames_of(first.frames);
    const Shape shape = {signed_size(requests.size()), channels(stage), signed_size(frames),
                         signed_size(first.height / factor), signed_size(first.width / factor)};

    LoopRun run{loop.name,
                stage,
                sources.batch(stage, loop),
                solver_table(loop.schedule, loop.prediction, *options.solver, options.steps),
                Array::of({shape[0], shape[2]}, std::vector<float>()),
                {},
                loop.noise.purpose};
    run.windows = options.settings.windows;
    run.tiles = loop.tiles;
    run.edit = sources.known(loop);
    run.tokens = sources.tokens();
    run.interval = options.settings.interval;
    run.reuse = options.settings.reuse, run.reuses = reuses;
    if (options.settings.stretch != 1.0) {
        const Source source{Source::Kind::made, loop.stretch->loop, "latents"};
        run.stretch = Stretching{spread_latents(sources.latents(source, loop)->to_host(), shape, loop),
                                 static_cast<float>(options.settings.stretch)};
    }
    for (const auto& request : requests) {
        const auto& scales = request.loops[index].guidance;
        auto& guidance = std::get<0>(run.guidance.values);
        guidance.insert(guidance.end(), scales.begin(), scales.end());
        run.seeds.push_back(request.seed);
    }
    const auto pair = first.pair(loop);
    if (!run.interval.whole() && stage.name != pair.plain)
        run.outside = std::make_shared<const LoopRun>(without_guidance(run, pair, loop, sources));
    if (const auto& repeats = options.settings.free_init) {
        const NoiseOf noise_of = [&](std::size_t iteration) {
            return std::pair(unit_noise(loop, requests, shape, run.windows, iteration),
                             added_noise(loop, requests, shape, sources, run.windows, iteration));
        };
        return denoise_again(backend_, run, shape, noise_of, last_level(loop.schedule), *repeats, on_step,
                             cancellation);
    }
    std::vector<float> clean;
    if (first.begins(loop)) {
        clean = spread_latents(sources.latents(loop.start->latents, loop)->to_host(), shape, loop);
        run.first = tail_row(run.table.rows.size(), first.number(loop.start->strength));
    }
    if (first.inverts(loop))
        return run_inverted(run, requests, loop, sources, Array::of(shape, std::move(clean)), on_step, cancellation);
    const auto added = added_noise(loop, requests, shape, sources, run.windows, 0);
    auto state =
        initial_state(run.table, unit_noise(loop, requests, shape, run.windows, 0), added, clean, run.first);
    return denoise(backend_, run, host_tensor(Array::of(shape, std::move(state))), on_step, cancellation);
}

// A loop that begins from an inverted picture or clip (higen/loop_run.py): its clean latents are carried up the noise
// levels with the text of the inversion and without guidance; then `run` is run. While they are carried up, no frames
// are known, and an earlier loop of one frame has the middle frame of the latents as its result.
TensorPtr Pipeline::run_inverted(const LoopRun& run, const std::vector<Request>& requests, const Loop& loop,
                                 Sources& sources, const Array& clean, const OnStep& on_step,
                                 Cancellation& cancellation) const {
    const auto& first = requests.front();
    std::vector<Request> inverted;
    for (const auto& request : requests) inverted.push_back(described(manifest_, request));
    Sources upward(manifest_, backend_, inverted, cancellation);
    for (const auto* earlier : manifest_.wanted(first.frames)) {
        if (earlier == &loop) break;
        if (!earlier->every_frame)
            upward.finish(*earlier, host_tensor(cut(clean, 2, static_cast<std::size_t>(clean.shape[2]) / 2, 1)));
        else if (first.runs(*earlier) || first.replaces(*earlier))
            upward.finish(*earlier, sources.latents(Source{Source::Kind::made, earlier->name, "latents"}, *earlier));
    }
    auto up = without_guidance(run, first.pair(loop), loop, upward);
    up.table = inverse_rows(first, loop, first.loops[index_of(loop)]);
    const auto rows = up.table.rows.size(), total = rows + run.table.rows.size() - run.first;
    const auto counted_from = [&](std::size_t before) {
        return [&on_step, before, total](const Step& step) {
            on_step({step.loop, step.stage, before + step.index, total, step.t, step.previous});
        };
    };
    const auto noisy = denoise(backend_, up, host_tensor(clean), counted_from(0), cancellation);
    return denoise(backend_, run, noisy, counted_from(rows), cancellation);
}

// In a loop over a clip, a picture's latents are repeated for every frame.
TensorPtr Pipeline::replaced(const Loop& loop, const std::vector<Request>& requests, Sources& sources) {
    auto latents = sources.latents(loop.replaced->latents, loop);
    const auto frames = signed_size(loop.frames_of(requests.front().frames));
    if (latents->shape()[2] != 1 || frames == 1) return latents;
    auto shape = latents->shape();
    shape[2] = frames;
    return host_tensor(Array::of(shape, spread_latents(latents->to_host(), shape, loop)));
}

void Pipeline::generate(const std::vector<Request>& requests, const OnStep& on_step, const OnFrames& on_frames,
                        Cancellation& cancellation) const {
    const auto& first = requests.front();
    prepare_reuse(requests);
    Sources sources(manifest_, backend_, requests, cancellation);
    TensorPtr latents;
    for (const auto* loop : manifest_.wanted(first.frames)) {
        if (first.replaces(*loop))
            latents = replaced(*loop, requests, sources);
        else if (first.runs(*loop))
            latents = run_loop(index_of(*loop), requests, sources, on_step, cancellation);
        else
            continue;
        sources.finish(*loop, latents);
    }
    if (!latents)
        fail_request("frames=" + std::to_string(first.frames) + ": no loop of this model makes so few frames");
    decode(*latents, requests, sources, nullptr, on_frames, cancellation);
}

void Pipeline::preview(const Tensor& latents, const std::vector<Request>& requests, const OnFrames& on_frames,
                       Cancellation& cancellation) const {
    Sources sources(manifest_, backend_, requests, cancellation);
    const Stage* decoder = nullptr;
    if (const auto& row = manifest_.sizes.preview) {
        const auto& found = backend_.choose({&manifest_.stage(row->decoder), &manifest_.stage(manifest_.sizes.decoder)});
        if (found.name == row->decoder) decoder = &found;
    }
    decode(latents, requests, sources, decoder, on_frames, cancellation);
}

// The decoder that a request chooses.
const Stage& Pipeline::decoder_of(const Request& request) const {
    const auto& row = manifest_.sizes.preview;
    if (!row) return manifest_.stage(manifest_.sizes.decoder);
    const auto& chosen = request.values.at(row->control);
    return manifest_.stage(chosen && chosen->text == row->choice ? row->decoder : manifest_.sizes.decoder);
}

// A chunk never mixes samples, because rounding can depend on the batch size. Context frames around a chunk are decoded
// with it and dropped. `fixed`: the decoder of all videos; a null pointer: the one that each request chooses.
void Pipeline::decode(const Tensor& latents, const std::vector<Request>& requests, Sources& sources, const Stage* fixed,
                      const OnFrames& on_frames, Cancellation& cancellation) const {
    const auto z = latents.to_host();
    const auto total = static_cast<std::size_t>(z.shape[2]), step = static_cast<std::size_t>(manifest_.sizes.chunk);
    const auto overlap = static_cast<std::size_t>(manifest_.sizes.overlap);
    for (std::size_t video = 0; video < requests.size(); ++video) {
        const auto& decoder = fixed == nullptr ? decoder_of(requests[video]) : *fixed;
        const auto given = std::find_if(decoder.inputs.begin(), decoder.inputs.end(),
                                        [](const auto& input) { return input.source.kind == Source::Kind::state; });
        const auto rank = given->shape.size();
        const auto sample = cut(z, 0, video, 1);
        const auto others = sources.inputs(decoder, {video, total, nullptr, false});
        for (std::size_t first = 0; first < total; first += step) {
            cancellation.check();
            const auto last = std::min(first + step, total);
            const auto begin = first - std::min(first, overlap), end = std::min(last + overlap, total);
            Tensors inputs;
            for (const auto& [name, tensor] : others) {
                const auto& shape = decoder.input(name)->shape;
                const auto axis = axis_of(shape, "F");
                inputs.emplace(name, axis == shape.size()
                                         ? tensor
                                         : host_tensor(cut(tensor->to_host(), axis, begin, end - begin)));
            }
            inputs.emplace(given->name, host_tensor(chunk_of(sample, begin, end, rank)));
            const auto pixels = backend_.run(decoder, inputs, cancellation).at(decoder.outputs.front().name)->to_host();
            const auto n = signed_size(end - begin), y = signed_size(requests[video].height),
                       x = signed_size(requests[video].width);
            if (pixels.shape != (rank == 4 ? Shape{n, 3, y, x} : Shape{1, 3, n, y, x}))
                fail_backend(decoder.name + " gave pixels " + to_text(pixels.shape));
            const auto rgb = to_frames(pixels, first - begin, last - first);
            on_frames({rgb, video, first, last - first, total});
        }
    }
}

}  // namespace higen::core
