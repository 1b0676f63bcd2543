#include <cmath>
#include <limits>
#include <set>

#include "references.h"
#include "stages.h"

namespace higen::core {

using namespace references;

namespace {

constexpr std::size_t most_presets = 100;

void check_scale(const Manifest& manifest, const std::string& where, const Scale& scale, bool is_part) {
    if (scale.control.empty())
        return check(!is_part || (scale.value >= 0 && scale.value <= 1), where + ": a number from 0 to 1");
    const auto numbers = controls_that(manifest, [](const auto& c) { return c.kind == Control::Kind::number; });
    check(has(numbers, scale.control),
          where + "='control:" + scale.control + "': a number, or control:NAME of a number: " + joined(numbers));
}

// The axes of a denoising stage: latents [B, C, f, H, W], columns [B], guidance [B, f], conditions [B, ...].
void check_step(const Manifest& manifest, const Loop& loop, const Stage& stage, const std::string& where) {
    const auto& shape = stage.input("latents")->shape;
    const std::string own = loop.every_frame ? "F" : "1";
    const bool five = shape.size() == 5;
    const auto frames = five && is_shape({shape[2]}, {"F"}) ? std::string("F") : own;
    check(five && is_shape({shape[0], shape[2], shape[3], shape[4]}, {"B", frames, "H", "W"}) &&
              size_of(manifest, shape[1]) > 0,
          where + ": latents are [B, C, " + own + ", H, W], C of a fixed size, not " + shown(shape));
    Names state;
    for (const auto& axis : shape) state.push_back(axis.symbol.empty() ? std::to_string(axis.size) : axis.symbol);
    const auto check_state = [&](const TensorSpec& tensor) {
        const bool is_state = tensor.name == "latents" || tensor.name == "previous";
        const auto wanted = is_state ? state : tensor.name == "guidance" ? Names{"B", frames} : Names{"B"};
        check(tensor.is_float && is_shape(tensor.shape, wanted),
              where + ": " + tensor.name + " is float32 [" + joined(wanted) + "], not " + shown(tensor.shape));
    };
    for (const auto& tensor : stage.outputs) check_state(tensor);
    for (const auto& tensor : stage.inputs) {
        if (tensor.source.kind == Source::Kind::state)
            check_state(tensor);
        else
            check(tensor.shape.front().symbol == "B", where + ": the first axis of " + tensor.name + " is B");
    }
}

void check_loop_stage(const Manifest& manifest, const Loop& loop, const std::string& name, bool guided,
                      const std::string& before = "") {
    if (name.empty()) return;
    const auto row = "loops." + loop.name + before + (guided ? ".guided='" : ".plain='") + name + "'";
    const auto* stage = manifest.find_stage(name);
    check(stage != nullptr, row + ": the stages are " + joined(names_of(manifest.stages)));
    check(stage->denoises() && stage->outputs.size() == 2, row + ": must give only latents and previous");
    check(stage->batch, row + ": batch must be true, because a denoising stage takes several samples");
    Names wanted = {"A", "B", "C", "alpha"};
    if (guided) wanted.emplace_back("guidance");
    for (const auto* other : {"latents", "previous", "sigma", "t"}) wanted.emplace_back(other);
    Names state;
    for (const auto& tensor : stage->inputs)
        if (tensor.source.kind == Source::Kind::state) state.push_back(tensor.name);
    std::sort(state.begin(), state.end());
    check(state == wanted, row + ": its state inputs must be " + joined(wanted));
    check_step(manifest, loop, *stage, row);
}

// A loop of one frame cannot take the latents of a loop over the clip's frames.
void check_length(const Manifest& manifest, const Loop& loop, const std::string& where, const std::string& name) {
    const auto* other = manifest.loop(name);
    check(loop.every_frame || other == nullptr || !other->every_frame,
          where + "='" + name + "': has all frames of the clip, but " + loop.name + " has one");
}

void check_loop_controls(const Manifest& manifest, const Loop& loop, const std::string& where) {
    const auto numeric = controls_that(manifest, [](const auto& control) { return control.is_numeric(); });
    for (const auto& [name, value] : loop.controls) {
        const auto row = where + ".controls." + name;
        check(has(numeric, name), row + ": the controls with numbers are " + joined(numeric));
        const auto& control = *manifest.control(name);
        check(control.allows(value) && (control.kind != Control::Kind::whole || value == std::floor(value)),
              row + "=" + std::to_string(value) + ": " + control.range());
    }
    const auto visual = controls_that(manifest, [](const auto& control) { return control.is_picture(); });
    const auto check_given = [&](const std::string& key, const std::string& control, const Source& latents) {
        check(has(visual, control),
              where + "." + key + ".control='" + control + "': the pictures and clips are " + joined(visual));
        check_made(manifest, where + "." + key + ".latents", latents, 5);
        check(latents.given.empty() || latents.given == control,
              where + "." + key + ".latents='" + to_text(latents) + "': @" + latents.given + " is not " + control);
        check_length(manifest, loop, where + "." + key + ".latents", latents.name);
    };
    if (loop.replaced) check_given("replaced", loop.replaced->control, loop.replaced->latents);
    if (loop.start) {
        check_given("start", loop.start->control, loop.start->latents);
        check_scale(manifest, where + ".start.strength", loop.start->strength, true);
    }
    if (loop.noise.offset) check_scale(manifest, where + ".noise.offset.scale", loop.noise.offset->scale, false);
    if (loop.noise.mix) check_scale(manifest, where + ".noise.mix.scale", loop.noise.mix->scale, false);
}

// Checks the known frames that a loop's result passes through.
void check_known(const Manifest& manifest, const Loop& loop, const std::string& where) {
    for (const auto& stage : loop.stages())
        for (const auto& tensor : manifest.stage(stage).inputs)
            check(tensor.source.kind != Source::Kind::known || loop.known,
                  where + "=null: a stage of it takes " + to_text(tensor.source));
    if (!loop.known) return;
    const auto& known = *loop.known;
    const auto is_kind = [&](const std::string& name, Control::Kind kind) {
        const auto* control = manifest.control(name);
        return control != nullptr && control->kind == kind;
    };
    check(loop.every_frame || manifest.sizes.most_frames == 1,
          where + ": " + loop.name + " has one frame, but a clip may have " +
              std::to_string(manifest.sizes.most_frames));
    check(is_kind(known.control, Control::Kind::frames),
          where + ".control='" + known.control + "': a control of kind frames");
    check(known.mask.empty() || is_kind(known.mask, Control::Kind::mask),
          where + ".mask='" + known.mask + "': null, or a control of kind mask");
    check(known.latents.given == known.control,
          where + ".latents='" + to_text(known.latents) + "': STAGE@" + known.control + ".OUTPUT");
    check_frames_of(manifest, where + ".latents", known.latents);
    auto plain = known.latents;
    plain.given.clear();
    check_made(manifest, where + ".latents", plain, 5);
}

// Checks the variant, which names other stages for a loop's steps.
void check_variant(const Manifest& manifest, const Loop& loop, const Variant& variant) {
    const auto where = "loops." + loop.name + ".variant";
    const auto names = controls_that(manifest, [](const auto& control) {
        return control.kind == Control::Kind::map || control.kind == Control::Kind::frames;
    });
    check(has(names, variant.control),
          where + ".control='" + variant.control + "': the controls of kind map or frames are " + joined(names));
    const auto same = [&](const char* key, const std::string& own, const std::string& other) {
        check(own.empty() == other.empty(),
              where + "." + key + "='" + other + "': null if and only if the loop's own " + key + " is null");
    };
    same("guided", loop.guided, variant.stages.guided);
    same("plain", loop.plain, variant.stages.plain);
    check_loop_stage(manifest, loop, variant.stages.guided, true, ".variant");
    check_loop_stage(manifest, loop, variant.stages.plain, false, ".variant");
}

void check_loop(const Manifest& manifest, const Loop& loop, const Names& earlier) {
    const auto where = "loops." + loop.name;
    check_loop_stage(manifest, loop, loop.guided, true);
    check_loop_stage(manifest, loop, loop.plain, false);
    if (loop.variant) check_variant(manifest, loop, *loop.variant);
    for (const auto& name : loop.stages())
        for (const auto& tensor : manifest.stage(name).inputs)
            check(tensor.source.kind != Source::Kind::made || manifest.loop(tensor.source.name) == nullptr ||
                      has(earlier, tensor.source.name),
                  where + ": needs the latents of " + tensor.source.name + ", which runs later");
    const auto check_earlier = [&](const std::string& key, const std::string& does, const std::string& other) {
        check(has(earlier, other), where + "." + key + ".loop='" + other + "': an earlier loop");
        check_length(manifest, loop, where + "." + key + ".loop", other);
        check(manifest.loop(other)->least_frames <= std::max(loop.least_frames, manifest.sizes.fewest_frames),
              where + ": " + does + " " + other + ", but " + other + " is left out for shorter clips");
    };
    if (loop.noise.mix) check_earlier("noise.mix", "its noise is mixed with", loop.noise.mix->loop);
    if (loop.stretch) check_earlier("stretch", "its result is stretched from", loop.stretch->loop);
    check_known(manifest, loop, where + ".known");
    check_loop_controls(manifest, loop, where);
}

// A preset has a value for each loop that the loop can take.
void check_preset(const Manifest& manifest, const Preset& preset) {
    const auto where = "presets." + preset.name + ".", loops = std::to_string(manifest.loops.size());
    const auto check_count = [&](const char* key, std::size_t count) {
        check(count == manifest.loops.size(),
              where + key + ": " + loops + " entries, one per loop, not " + std::to_string(count));
    };
    check_count("steps", preset.steps.size());
    check_count("guidance", preset.guidance.size());
    check_count("stretch", preset.stretch.size());
    for (std::size_t i = 0; i < manifest.loops.size(); ++i) {
        const auto& loop = manifest.loops[i];
        const auto most = max_steps(loop.schedule, loop.solvers.front());
        const auto of = " for the loop " + loop.name;
        const auto steps = preset.steps[i].value_or(1);
        check(steps >= 1 && steps <= most,
              where + "steps has " + std::to_string(steps) + of + ": null, or from 1 to " + std::to_string(most));
        const auto scale = preset.guidance[i].value_or(1.0);
        const bool fits = scale >= 0 && scale <= std::numeric_limits<float>::max();
        check(loop.guided.empty() ? scale == 1 : fits,
              where + "guidance has " + std::to_string(scale) + of + ": null, or " +
                  (loop.guided.empty() ? "1, because the loop has no guidance" : "a number from 0"));
        check(!preset.stretch[i] || loop.stretch, where + "stretch has " + std::to_string(preset.stretch[i].value_or(1)) +
                                                      of + ", but loops." + loop.name + ".stretch is null");
    }
}

// Check a stage that turns latents into pixels. Returns the channels of the latents.
std::int64_t check_decoder(const Manifest& manifest, const std::string& key, const std::string& name) {
    const auto where = key + "='" + name + "': ";
    const auto* decoder = manifest.find_stage(name);
    check(decoder != nullptr, where + "the stages are " + joined(names_of(manifest.stages)));
    std::vector<const TensorSpec*> state;
    for (const auto& tensor : decoder->inputs)
        if (tensor.source.kind == Source::Kind::state) state.push_back(&tensor);
    bool fits = state.size() == 1 && decoder->outputs.size() == 1 && state.front()->shape.size() >= 2;
    if (fits) {
        auto axes = state.front()->shape;
        fits = size_of(manifest, axes[1]) > 0;
        axes.erase(axes.begin() + 1);
        const auto& pixels = decoder->outputs.front().shape;
        fits = fits && ((is_shape(axes, {"N", "H", "W"}) && is_shape(pixels, {"N", "3", "Y", "X"})) ||
                        (is_shape(axes, {"B", "F", "H", "W"}) && is_shape(pixels, {"B", "3", "F", "Y", "X"})));
    }
    check(fits, where +
                    "one input with the source state, [N, C, H, W] and the output [N, 3, Y, X], or [B, C, F, H, W] and "
                    "[B, 3, F, Y, X], C of a fixed size");
    return size_of(manifest, state.front()->shape[1]);
}

void check_decoders(const Manifest& manifest) {
    const auto channels = check_decoder(manifest, "sizes.decoder", manifest.sizes.decoder);
    if (!manifest.sizes.preview) return;
    const auto& row = *manifest.sizes.preview;
    const auto own = check_decoder(manifest, "sizes.preview.decoder", row.decoder);
    const auto where = "sizes.preview.decoder='" + row.decoder + "': ";
    check(row.decoder != manifest.sizes.decoder, where + "another stage than sizes.decoder");
    check(own == channels, where + "its latents have " + std::to_string(own) + " channels, but those of sizes.decoder have " +
                               std::to_string(channels));
    check(manifest.stage(row.decoder).inputs.size() == 1, where + "no other input than the latents");
    Names known;
    for (const auto& control : manifest.controls)
        if (control.kind == Control::Kind::choice) known.push_back(control.name);
    check(has(known, row.control),
          "sizes.preview.control='" + row.control + "': the controls of kind choice are " + joined(known));
    const auto& control = *manifest.control(row.control);
    check(has(control.choices, row.choice) && control.standard && control.standard->text != row.choice,
          "sizes.preview.choice='" + row.choice + "': one of " + joined(control.choices) + ", and not the default");
}

// For every number of frames, the last loop that runs must have all frames.
void check_result(const Manifest& manifest) {
    const auto fewest = manifest.sizes.fewest_frames, most = manifest.sizes.most_frames;
    std::set<std::int64_t> counts = {fewest, std::min(std::max<std::int64_t>(fewest, 2), most)};
    for (const auto& loop : manifest.loops)
        if (loop.least_frames > fewest && loop.least_frames <= most) counts.insert(loop.least_frames);
    for (const auto frames : counts) {
        const Loop* last = nullptr;
        for (const auto& loop : manifest.loops)
            if (loop.least_frames <= frames) last = &loop;
        const auto n = std::to_string(frames);
        check(last != nullptr && (frames == 1 || last->every_frame),
              "loops: a clip of " + n + " frames needs a last loop with frames 'F' and least_frames <= " + n);
    }
}

// The loops that feed these stages must not be left out for a clip of `frames`.
void check_fed(const Manifest& manifest, const Names& stages, std::int64_t frames) {
    for (const auto& stage : manifest.feeding(stages))
        for (const auto& name : needs(manifest, stage)) {
            const auto* loop = manifest.loop(name);
            check(loop == nullptr || loop->least_frames <= frames, "loops." + name + ": is left out for clips of " +
                                                                       std::to_string(frames) + " frames, but " +
                                                                       stages.front() + " needs its latents");
        }
}

}  // namespace

std::vector<const Loop*> Manifest::wanted(std::size_t frames) const {
    const auto is_left_out = [&](const Loop& loop) { return loop.least_frames > static_cast<std::int64_t>(frames); };
    Names open = {sizes.decoder};
    for (const auto& loop : loops)
        if (!is_left_out(loop)) open.back() = loop.name;
    open.push_back(sizes.decoder);
    std::set<std::string, std::less<>> found;
    while (!open.empty()) {
        const auto next = open.back();
        open.pop_back();
        if (!found.insert(next).second) continue;
        for (const auto& other : needs(*this, next)) open.push_back(other);
    }
    std::vector<const Loop*> running;
    for (const auto& loop : loops)
        if (found.count(loop.name) > 0 && !is_left_out(loop)) running.push_back(&loop);
    return running;
}

void references::check_loops(const Manifest& manifest) {
    const auto loops = names_of(manifest.loops);
    for (std::size_t i = 0; i < loops.size(); ++i)
        check_loop(manifest, manifest.loops[i], {loops.begin(), loops.begin() + static_cast<std::ptrdiff_t>(i)});
    check_decoders(manifest);
    check_result(manifest);
    check(manifest.presets.size() <= most_presets, "presets: at most " + std::to_string(most_presets) + " rows");
    const auto presets = names_of(manifest.presets);
    for (std::size_t i = 0; i < presets.size(); ++i) {
        const Names others{presets.begin(), presets.begin() + static_cast<std::ptrdiff_t>(i)};
        check(!has(others, presets[i]), "presets: " + presets[i] + " appears twice");
        check_preset(manifest, manifest.presets[i]);
    }
    Names usual;
    for (const auto& preset : manifest.presets)
        if (preset.usual) usual.push_back(preset.name);
    check(usual.size() < 2, "presets: " + joined(usual) + " are usual; at most one is");
    const auto fewest = manifest.sizes.fewest_frames;
    for (const auto& loop : manifest.loops) check_fed(manifest, loop.stages(), std::max(loop.least_frames, fewest));
    check_fed(manifest, {manifest.sizes.decoder}, fewest);
}

}  // namespace higen::core
