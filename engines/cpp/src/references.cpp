#include "references.h"

#include <map>
#include <set>

namespace higen::core {

using namespace references;

namespace {

const std::set<std::string, std::less<>> free_symbols = {"B", "F", "N", "H", "W", "Y", "X"};

// Whether a text can have several chunks; the number of its tokens is then free.
bool has_chunks(const Manifest& manifest) { return manifest.text && manifest.text->chunks > 1; }

constexpr std::size_t most_rows = 100;
constexpr std::int64_t most_columns = 1 << 16;

bool is_free(const Manifest& manifest, const std::string& symbol) {
    return free_symbols.count(symbol) > 0 || (symbol == tokens_symbol && has_chunks(manifest));
}

void check_shape(const Manifest& manifest, const std::string& where, const std::vector<Axis>& shape) {
    check(!shape.empty(), where + ": at least one axis");
    for (const auto& axis : shape)
        check(axis.symbol.empty() || is_free(manifest, axis.symbol) || manifest.sizes.symbols.count(axis.symbol) > 0,
              where + ": '" + axis.symbol + "': a size, one of B, F, N, H, W, Y, X, or a name in sizes.symbols");
}

Names fitting_controls(const Manifest& manifest, Source::Kind kind) {
    return controls_that(manifest, [&](const Control& control) {
        if (kind == Source::Kind::picture) return control.kind == Control::Kind::picture;
        if (kind == Source::Kind::clip)
            return control.kind == Control::Kind::clip || control.kind == Control::Kind::map;
        return control.is_numeric() || control.kind == Control::Kind::choice;
    });
}

void check_control_source(const Manifest& manifest, const std::string& where, const TensorSpec& tensor) {
    const auto& source = tensor.source;
    if (source.kind == Source::Kind::control && source.name == "fps") return;
    const auto row = where + ": source " + to_text(source);
    const auto fitting = fitting_controls(manifest, source.kind);
    check(has(fitting, source.name), row + ": the controls of this kind are " + joined(fitting));
    const auto rank = tensor.shape.size();
    if (source.kind == Source::Kind::picture) return check(rank == 4, row + ": 4 axes, not " + shown(tensor.shape));
    if (source.kind == Source::Kind::clip)
        return check(rank == 4 || rank == 5, row + ": 4 or 5 axes, not " + shown(tensor.shape));
    const auto encoding = manifest.control(source.name)->encoding;
    const std::size_t wanted = encoding == Control::Encoding::number ? 1 : encoding == Control::Encoding::curve ? 2 : 3;
    check(encoding != Control::Encoding::none, row + ": it has no encoding");
    check(rank == wanted, where + ": the encoding " + to_text(encoding) + " gives " + std::to_string(wanted) +
                              " axes, not " + std::to_string(rank));
    const auto columns = size_of(manifest, tensor.shape.back());
    check(wanted < 3 || (columns > 0 && columns <= most_columns), where + ": the encoding " + to_text(encoding) +
                                                                      " needs a last axis of a fixed size of at most " +
                                                                      std::to_string(most_columns));
}

void check_tokens(const Manifest& manifest, const std::string& where, const TensorSpec& tensor) {
    check(manifest.text.has_value(), where + ": source " + to_text(tensor.source) + ", but text is null");
    check(!tensor.is_float, where + ": tokens are int64");
    const auto length = manifest.text->length;
    check(tensor.shape.size() == 2 && size_of(manifest, tensor.shape[1]) == length,
          where + ": tokens are [B, " + std::to_string(length) + "], not " + shown(tensor.shape));
}

// Checks a source that takes a stage's pixels as a picture.
void check_shown(const Manifest& manifest, const std::string& where, const TensorSpec& tensor) {
    const auto row = where + ": source " + to_text(tensor.source);
    check(tensor.shape.size() == 4, row + ": 4 axes, not " + shown(tensor.shape));
    const auto* stage = manifest.find_stage(tensor.source.name);
    check(stage != nullptr, row + ": the stages are " + joined(names_of(manifest.stages)));
    const auto* output = stage->output(tensor.source.output);
    check(output != nullptr, row + ": " + stage->name + " gives " + joined(names_of(stage->outputs)));
    const auto& made = output->shape;
    const auto rank = made.size();
    check((rank == 4 || rank == 5) && size_of(manifest, made[1]) == 3 && made[rank - 2].symbol == "Y" &&
              made[rank - 1].symbol == "X",
          row + ": [N, 3, Y, X] or [B, 3, F, Y, X] is wanted, not " + shown(made));
}

// Checks a source that gives known frames as a condition.
void check_known_source(const std::string& where, const TensorSpec& tensor) {
    const bool latents = tensor.source.name == "latents";
    auto axes = tensor.shape;
    bool good = axes.size() == 5 && (latents || (axes[1].symbol.empty() && axes[1].size == 1));
    if (good) axes.erase(axes.begin() + 1);
    good = good ? is_shape(axes, {"B", "F", "H", "W"}) : !latents && is_shape(axes, {"B", "F"});
    check(good && tensor.is_float, where + ": " + to_text(tensor.source) + " is float32 " +
                                       (latents ? "[B, C, F, H, W]" : "[B, F] or [B, 1, F, H, W]") + ", not " +
                                       shown(tensor.shape));
}

bool is_of_frames(const Manifest& manifest, const std::string& control) {
    const auto* row = manifest.control(control);
    return row != nullptr && row->kind == Control::Kind::frames;
}

// Checks a source that gives the pictures of a control of kind frames at their places, or these places.
void check_frames_source(const Manifest& manifest, const std::string& where, const TensorSpec& tensor) {
    const auto& source = tensor.source;
    const auto names = controls_that(manifest, [](const auto& row) { return row.kind == Control::Kind::frames; });
    check(has(names, source.name),
          where + ": source " + to_text(source) + ": the controls of kind frames are " + joined(names));
    const bool places = source.kind == Source::Kind::places;
    auto axes = tensor.shape;
    bool good = places ? is_shape(axes, {"B", "F"}) : axes.size() == 5 && size_of(manifest, axes[1]) == 3;
    if (good && !places) {
        axes.erase(axes.begin() + 1);
        good = is_shape(axes, {"B", "F", "Y", "X"});
    }
    check(good && tensor.is_float, where + ": " + to_text(source) + " is float32 " +
                                       (places ? "[B, F]" : "[B, 3, F, Y, X]") + ", not " + shown(tensor.shape));
}

// Checks an input that takes what a stage made of the frames of a control, at their places in the clip.
void check_placed(const Manifest& manifest, const std::string& where, const TensorSpec& tensor) {
    if (!is_of_frames(manifest, tensor.source.given)) return;
    auto axes = tensor.shape;
    if (axes.size() == 5) axes.erase(axes.begin() + 1);
    check(tensor.shape.size() == 5 && is_shape(axes, {"B", "F", "H", "W"}),
          where + ": " + to_text(tensor.source) + " is [B, C, F, H, W], not " + shown(tensor.shape));
}

void check_source(const Manifest& manifest, const std::string& where, const TensorSpec& tensor) {
    switch (tensor.source.kind) {
        case Source::Kind::text: check_tokens(manifest, where, tensor); break;
        case Source::Kind::control:
        case Source::Kind::picture:
        case Source::Kind::clip: check_control_source(manifest, where, tensor); break;
        case Source::Kind::made:
            if (tensor.source.shown)
                check_shown(manifest, where, tensor);
            else
                check_made(manifest, where, tensor.source, tensor.shape.size());
            check_placed(manifest, where, tensor);
            break;
        case Source::Kind::known: check_known_source(where, tensor); break;
        case Source::Kind::frames:
        case Source::Kind::places: check_frames_source(manifest, where, tensor); break;
        case Source::Kind::state:
        case Source::Kind::noise: break;
    }
}

// A free axis of an output must be an axis of an input, or an input must have the matching axis of pixels or latents.
void check_output(const Manifest& manifest, const Stage& stage, const TensorSpec& output) {
    const auto given = [&](const std::string& symbol) {
        return std::any_of(stage.inputs.begin(), stage.inputs.end(),
                           [&](const TensorSpec& input) { return axis_of(input.shape, symbol) < input.shape.size(); });
    };
    const std::map<std::string, std::string> beside = {{"H", "Y"}, {"W", "X"}, {"Y", "H"}, {"X", "W"}};
    for (const auto& axis : output.shape) {
        if (!is_free(manifest, axis.symbol)) continue;
        const auto other = beside.find(axis.symbol);
        check(given(axis.symbol) || (other != beside.end() && given(other->second)),
              "stages." + stage.name + "." + output.name + ": " + axis.symbol + " is not an axis of any of its inputs");
    }
}

bool reads_text(const Stage& stage) {
    return std::any_of(stage.inputs.begin(), stage.inputs.end(),
                       [](const auto& tensor) { return tensor.source.kind == Source::Kind::text; });
}

// Whether an input is fed with all chunks of a text.
bool is_fed_chunks(const Manifest& manifest, const TensorSpec& tensor) {
    if (tensor.source.kind != Source::Kind::made) return false;
    const auto* stage = manifest.find_stage(tensor.source.name);
    if (stage == nullptr) return false;
    const auto& axes = stage->output(tensor.source.output)->shape;
    return reads_text(*stage) || axis_of(axes, tokens_symbol) < axes.size();
}

// For texts with chunks or weights: a stage that reads a text outputs [B, L, D], and an input that takes the tokens of
// all chunks is [B, T, D].
void check_chunks(const Manifest& manifest, const std::string& where, const Stage& stage) {
    const auto texts = std::count_if(stage.inputs.begin(), stage.inputs.end(), [](const auto& tensor) {
        return tensor.source.kind == Source::Kind::text;
    });
    check(texts < 2, where + ": reads two texts, but text.weights and text.chunks allow one text per stage");
    if (texts == 1)
        for (const auto& made : stage.outputs)
            check(made.shape.size() == 3 && size_of(manifest, made.shape[1]) == manifest.text->length,
                  where + "." + made.name + ": with text.weights or text.chunks the shape is [B, L, D], not " +
                      shown(made.shape));
    if (!has_chunks(manifest)) return;
    for (const auto& tensor : stage.inputs) {
        const auto count = std::count_if(tensor.shape.begin(), tensor.shape.end(),
                                         [](const auto& axis) { return axis.symbol == tokens_symbol; });
        const bool fits = is_fed_chunks(manifest, tensor)
                              ? tensor.shape.size() == 3 && count == 1 && tensor.shape[1].symbol == tokens_symbol
                              : count == 0;
        check(fits, where + "." + tensor.name + ": [B, T, D] if it takes the chunks of a text, otherwise no axis T, " +
                        "not " + shown(tensor.shape));
    }
}

void check_stage(const Manifest& manifest, const Stage& stage) {
    const auto where = "stages." + stage.name;
    check(!stage.inputs.empty() && !stage.outputs.empty(), where + ": at least one input and one output");
    check_once(where + ".inputs", names_of(stage.inputs));
    check_once(where + ".outputs", names_of(stage.outputs));
    std::set<std::string> firsts;
    for (const auto* row : {&stage.inputs, &stage.outputs})
        for (const auto& tensor : *row) {
            check_shape(manifest, where + "." + tensor.name, tensor.shape);
            firsts.insert(tensor.shape.front().symbol);
        }
    for (const auto& output : stage.outputs) check_output(manifest, stage, output);
    check(!stage.batch || firsts == std::set<std::string>{"B"} || firsts == std::set<std::string>{"N"},
          where + ": batch is true, but the first axes are not all B, or all N");
    for (const auto& tensor : stage.inputs) check_source(manifest, where + "." + tensor.name, tensor);
    if (manifest.text && !manifest.text->plain()) check_chunks(manifest, where, stage);
}

// Depth-first with an explicit stack, because a chain of sources can be as long as the table.
void check_circles(const Manifest& manifest) {
    struct Visit {
        std::string name;
        Names needed;
        std::size_t next = 0;
    };
    std::set<std::string> done;
    Names roots = names_of(manifest.stages);
    for (const auto& loop : manifest.loops) roots.push_back(loop.name);
    for (const auto& root : roots) {
        std::vector<Visit> path;
        const auto enter = [&](const std::string& name) { path.push_back({name, needs(manifest, name), 0}); };
        if (done.count(root) == 0) enter(root);
        while (!path.empty()) {
            auto& visit = path.back();
            if (visit.next == visit.needed.size()) {
                done.insert(visit.name);
                path.pop_back();
                continue;
            }
            const auto needed = visit.needed[visit.next++];
            if (done.count(needed) > 0) continue;
            for (auto open = path.begin(); open != path.end(); ++open) {
                if (open->name != needed) continue;
                std::string circle;
                for (auto step = open; step != path.end(); ++step) circle += step->name + " <- ";
                fail_manifest("stages: the sources form a circle: " + circle + needed);
            }
            enter(needed);
        }
    }
}

}  // namespace

void references::check_frames_of(const Manifest& manifest, const std::string& where, const Source& source) {
    const auto row = where + ": source " + to_text(source);
    const auto* stage = manifest.find_stage(source.name);
    std::vector<const TensorSpec*> pixels;
    if (stage != nullptr)
        for (const auto& tensor : stage->inputs)
            if (tensor.source.kind == Source::Kind::picture || tensor.source.kind == Source::Kind::clip ||
                tensor.source.shown)
                pixels.push_back(&tensor);
    bool good = pixels.size() == 1 && pixels.front()->shape.size() == 4;
    if (good) {
        auto axes = pixels.front()->shape;
        axes.erase(axes.begin() + 1);
        good = is_shape(axes, {"N", "Y", "X"});
    }
    check(good, row + ": " + source.name + " takes no pixels [N, 3, Y, X] of a picture or clip");
}

void references::check_made(const Manifest& manifest, const std::string& where, const Source& source,
                            std::size_t rank) {
    const auto row = where + ": source " + to_text(source);
    check(source.kind == Source::Kind::made && !source.shown, row + ": STAGE.OUTPUT or LOOP.latents");
    if (!source.given.empty()) {
        const auto pictures = controls_that(
            manifest, [](const auto& one) { return one.is_picture() || one.kind == Control::Kind::frames; });
        check(has(pictures, source.given),
              row + ": the controls of kind picture, clip or frames are " + joined(pictures));
        check_frames_of(manifest, where, source);
    }
    if (manifest.loop(source.name) != nullptr) {
        check(source.output == "latents" && !source.negative, row + ": a loop gives only latents");
        check(rank == 4 || rank == 5, row + " has 4 or 5 axes, not " + std::to_string(rank));
        return;
    }
    const auto* stage = manifest.find_stage(source.name);
    check(stage != nullptr, row + ": the stages are " + joined(names_of(manifest.stages)));
    const auto* output = stage->output(source.output);
    check(output != nullptr, row + ": " + stage->name + " gives " + joined(names_of(stage->outputs)));
    check(!stage->denoises(), row + ": a denoising stage is run by its loop; take LOOP.latents");
    const auto made = output->shape.size();
    check(rank == made || (made == 4 && rank == 5),
          row + " has " + std::to_string(made) + " axes, not " + std::to_string(rank));
}

Names references::needs(const Manifest& manifest, const std::string& name) {
    Names needed;
    const auto add = [&](const Source& source) {
        if (source.kind == Source::Kind::made) needed.push_back(source.name);
    };
    const auto add_inputs = [&](const std::string& stage) {
        if (const auto* found = manifest.find_stage(stage))
            for (const auto& tensor : found->inputs) add(tensor.source);
    };
    if (const auto* loop = manifest.loop(name)) {
        if (loop->replaced) add(loop->replaced->latents);
        if (loop->start) add(loop->start->latents);
        if (loop->known) add(loop->known->latents);
        if (loop->noise.mix) needed.push_back(loop->noise.mix->loop);
        if (loop->stretch) needed.push_back(loop->stretch->loop);
        for (const auto& stage : loop->stages()) add_inputs(stage);
    } else {
        add_inputs(name);
    }
    return needed;
}

void check_references(const Manifest& manifest) {
    auto names = names_of(manifest.stages);
    const auto loops = names_of(manifest.loops), variants = names_of(manifest.variants);
    names.insert(names.end(), variants.begin(), variants.end());
    names.insert(names.end(), loops.begin(), loops.end());
    check_once("stages, loops", names);
    check_once("controls", names_of(manifest.controls));
    const auto rows = [&](std::size_t count) { return count >= 1 && count <= most_rows; };
    check(rows(manifest.stages.size()) && rows(manifest.loops.size()),
          "stages, loops: from 1 to " + std::to_string(most_rows) + " rows each");
    check(!has_chunks(manifest) || manifest.sizes.symbols.count(tokens_symbol) == 0,
          std::string("sizes.symbols.") + tokens_symbol + ": cannot be fixed together with text.chunks");
    for (const auto& stage : manifest.stages) check_stage(manifest, stage);
    check_circles(manifest);
    check_loops(manifest);
}

}  // namespace higen::core
