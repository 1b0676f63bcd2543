#include "request.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <set>

#include "encodings.h"
#include "errors.h"
#include "request_pictures.h"
#include "sampler.h"
#include "text.h"

namespace higen::core {
namespace {

// The most characters of a prompt. No model reads more than a few hundred, and cleaning a text takes time.
constexpr std::size_t max_prompt = 100'000;
constexpr std::size_t max_rows = 1 << 16;  // the most rows of a control's matrix

std::int64_t whole(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high)
        fail_request(std::string(name) + "=" + std::to_string(value) + ": a whole number from " + std::to_string(low) +
                     " to " + std::to_string(high));
    return value;
}

std::size_t side(const char* name, std::int64_t value, std::int64_t multiple) {
    const auto size = whole(name, value, multiple, max_side);
    const auto below = size / multiple * multiple;
    if (size != below)
        fail_request(std::string(name) + "=" + std::to_string(size) + ": a multiple of " + std::to_string(multiple) +
                     "; the nearest are " + std::to_string(below) + " and " + std::to_string(below + multiple));
    return static_cast<std::size_t>(size);
}

// A loop's entry in a list of the request. The list is null, or has one entry for all loops, or one per loop.
template <typename T>
const T* for_loop(const char* name, const T* values, std::size_t count, std::size_t loop, std::size_t loops) {
    if (values == nullptr) return nullptr;
    if (count != 1 && count != loops)
        fail_request(std::string(name) + " has " + std::to_string(count) + " entries: one for every loop, or " +
                     std::to_string(loops) + " (one per loop)");
    return values + (count == 1 ? 0 : loop);
}

std::vector<float> guidance_of(const Loop& loop, const higen_curve* given, std::optional<double> preset,
                               std::size_t frames) {
    const bool own = given != nullptr && given->values != nullptr;
    const auto allowed = ": a finite number, 0 or more, or one per frame (" + std::to_string(frames) + ")";
    if (own && given->count != 1 && given->count != frames)
        fail_request("guidance has " + std::to_string(given->count) + " numbers" + allowed);
    const auto standard = preset ? std::vector<double>{*preset} : loop.guidance;
    const auto scales = own ? std::vector<double>(given->values, given->values + given->count) : standard;
    for (const double scale : scales) {
        if (!(scale >= 0 && scale <= std::numeric_limits<float>::max()))
            fail_request("guidance=" + std::to_string(scale) + allowed);
        if (loop.guided.empty() && scale != 1)
            fail_request("guidance=" + std::to_string(scale) + ": the loop " + loop.name +
                         " has no guidance; 1 is allowed");
    }
    return spread(scales, frames);
}

const Solver* solver_of(const Loop& loop, const char* name) {
    if (name == nullptr) return &loop.solvers.front();
    if (const auto* found = loop.solver(name)) return found;
    std::string known;
    for (const auto& solver : loop.solvers) known += (known.empty() ? "'" : ", '") + solver.name + "'";
    fail_request("solver='" + std::string(name) + "': the loop " + loop.name + " takes " + known);
}

std::vector<LoopOptions> loop_options(const Manifest& manifest, const higen_request& given, std::size_t frames) {
    std::vector<LoopOptions> options;
    const auto loops = manifest.loops.size();
    const auto* preset = manifest.preset(given.preset);
    for (std::size_t i = 0; i < loops; ++i) {
        const auto& loop = manifest.loops[i];
        const auto* steps = for_loop("steps", given.steps, given.step_count, i, loops);
        const auto* guidance = for_loop("guidance", given.guidance, given.guidance_count, i, loops);
        const auto* solver = for_loop("solvers", given.solvers, given.solver_count, i, loops);
        auto& made = options.emplace_back();
        made.solver = solver_of(loop, solver == nullptr ? nullptr : *solver);
        const auto standard = preset == nullptr ? loop.steps : preset->steps[i].value_or(loop.steps);
        made.steps = whole("steps", steps == nullptr || *steps == 0 ? standard : *steps, 1,
                           max_steps(loop.schedule, *made.solver));
        made.guidance = guidance_of(loop, guidance, preset == nullptr ? std::nullopt : preset->guidance[i],
                                    loop.frames_of(frames));
    }
    return options;
}

MaybeValue value_of(const Manifest& manifest, const Control& control, const higen_control& given, std::size_t frames) {
    if (control.is_visual())
        fail_request(control.name + ": a " + to_text(control.kind) + " is given as a higen_picture");
    const bool numeric = control.is_numeric();
    if (given.values == nullptr && given.text == nullptr) {
        if (!control.optional)
            fail_request(control.name + " is unspecified: " + manifest.name + " was not trained without it");
        return std::nullopt;
    }
    if (numeric && given.values == nullptr) fail_request(control.name + ": numbers are wanted, not a text");
    if (!numeric && given.text == nullptr) fail_request(control.name + ": a text is wanted, not numbers");
    ControlValue value;
    if (numeric) {
        if (given.rows == 0 || given.columns == 0 || given.rows > max_rows || given.columns > max_rows)
            fail_request(control.name + " has no values, or too many");
        value = {{given.values, given.values + given.rows * given.columns}, given.rows, given.columns, ""};
    } else {
        if (!decode_utf8(given.text)) fail_request(control.name + " is not valid UTF-8");
        value = ControlValue::of(given.text);
    }
    check_value(control, value, frames);
    return value;
}

// A matrix must fit the columns of every input that takes it; `encode` checks that.
void check_columns(const Manifest& manifest, const Control& control, const MaybeValue& value, std::size_t frames) {
    if (!value || control.encoding != Control::Encoding::similarity) return;
    for (const auto& stage : manifest.stages)
        for (const auto& tensor : stage.inputs) {
            if (tensor.source.kind != Source::Kind::control || tensor.source.name != control.name) continue;
            const auto& axis = tensor.shape.back();
            const auto fixed = manifest.sizes.symbols.find(axis.symbol);
            const auto columns = fixed == manifest.sizes.symbols.end() ? axis.size : fixed->second;
            if (columns > 0) (void)encode(control, value, frames, static_cast<std::size_t>(columns));
        }
}

void take_controls(const Manifest& manifest, const higen_request& given, Request& request,
                   const Tokenizer::Warn& warn) {
    std::set<std::string> named;
    for (const auto& control : manifest.controls)
        if (!control.is_visual()) request.values[control.name] = control.standard;
    if (given.control_count > 0 && given.controls == nullptr) fail_request("controls is NULL");
    if (given.picture_count > 0 && given.pictures == nullptr) fail_request("pictures is NULL");
    for (std::size_t i = 0; i < given.control_count; ++i) {
        const auto& control = control_of(manifest, given.controls[i].name, named);
        auto value = value_of(manifest, control, given.controls[i], request.frames);
        check_columns(manifest, control, value, request.frames);
        request.values[control.name] = std::move(value);
    }
    take_pictures(manifest, given, request, warn, named);
}

void check_needed(const Manifest& manifest, const Request& request) {
    const auto check = [&](const std::string& user, const std::vector<std::string>& stages) {
        for (const auto& name : pictures_of(manifest, stages))
            if (!request.has_picture(name)) fail_request(name + ": " + user + " needs one");
    };
    for (const auto* loop : manifest.wanted(request.frames)) {
        const auto user = "the loop " + loop->name;
        if (request.runs(*loop)) check(user, request.pair(*loop).names());
        // A source that is made of a control's own frames needs no other picture.
        for (const auto& source : request.standing(*loop))
            if (source.given.empty()) check(user, {source.name});
        if (request.runs(*loop) && loop->start && loop->start->needed && !request.has_picture(loop->start->control))
            fail_request(loop->start->control + ": " + user + " needs one");
    }
    check("the decoder", {manifest.sizes.decoder});
}

std::u32string decoded(const char* name, const char* text) {
    auto letters = decode_utf8(text);
    if (!letters) fail_request(std::string("the ") + name + " is not valid UTF-8");
    if (letters->size() > max_prompt)
        fail_request(std::string(name) + " has " + std::to_string(letters->size()) + " characters: at most " +
                     std::to_string(max_prompt));
    return *letters;
}

void take_texts(const Tokenizer& tokenizer, const higen_request& given, const Tokenizer::Warn& warn, Request& request) {
    if (given.tokens != nullptr) {
        request.tokens = tokenizer.pad("tokens", {given.tokens, given.tokens + given.token_count});
    } else {
        const auto letters = decoded("prompt", given.prompt == nullptr ? "" : given.prompt);
        if (std::all_of(letters.begin(), letters.end(), is_python_space))
            fail_request("prompt: a text with at least one word");
        auto read = tokenizer.read(given.prompt, warn);
        request.tokens = std::move(read.ids), request.weights = std::move(read.weights);
    }
    const char* negative = given.negative_prompt == nullptr ? "" : given.negative_prompt;
    if (given.negative_tokens != nullptr) {
        request.negative_tokens = tokenizer.pad(
            "negative_tokens", {given.negative_tokens, given.negative_tokens + given.negative_token_count});
    } else {
        (void)decoded("negative prompt", negative);
        auto read = tokenizer.read(negative, warn, "negative_prompt");
        request.negative_tokens = std::move(read.ids), request.negative_weights = std::move(read.weights);
    }
    if (given.inversion != nullptr) {
        auto read = tokenizer.read(given.inversion, warn, "inversion");
        request.inversion_tokens = std::move(read.ids), request.inversion_weights = std::move(read.weights);
    }
    if (!tokenizer.rules().plain()) request.blank = tokenizer.encode("");
}

// An inversion needs a loop that begins from a picture or clip, with a solver that can be run backwards.
void check_inversion(const Manifest& manifest, const higen_request& given, const Request& request) {
    if (given.inversion == nullptr) return;
    (void)decoded("inversion", given.inversion);
    if (!manifest.text && *given.inversion != '\0')
        fail_request("inversion='" + std::string(given.inversion) + "': " + manifest.name +
                     " reads no texts; \"\" is allowed");
    std::string names;
    std::set<std::string> named;
    bool begins = false;
    for (const auto* loop : manifest.wanted(request.frames)) {
        if (!request.runs(*loop) || !loop->start) continue;
        if (named.insert(loop->start->control).second) names += (names.empty() ? "" : " or ") + loop->start->control;
        begins = begins || request.begins(*loop);
    }
    if (!begins)
        fail_request("inversion: no loop of this request begins from a picture or clip; " +
                     (names.empty() ? "no loop of " + manifest.name + " can do so" : "give " + names + " as well"));
    for (const auto* loop : manifest.wanted(request.frames)) {
        if (!request.begins(*loop)) continue;
        for (const auto& name : pictures_of(manifest, request.pair(*loop).names()))
            for (const auto& other : manifest.loops)
                if (other.known && (name == other.known->control || name == other.known->mask))
                    fail_request("inversion: the loop " + loop->name + " needs " + name +
                                 ", and while a clip is inverted, no frames are known; leave out one of the two");
        (void)inverse_rows(request, *loop, request.loops[static_cast<std::size_t>(loop - manifest.loops.data())]);
    }
}

// Only stages with deep features can reuse them; the stages of a loop's variant may have none.
void check_reuse(const Manifest& manifest, std::size_t index, const Request& request) {
    const auto& loop = manifest.loops[index];
    const auto every = request.loops[index].settings.reuse;
    const auto names = request.pair(loop).names();
    const bool has = std::all_of(names.begin(), names.end(), [&](const auto& name) {
        return !manifest.stage(name).variants().empty();
    });
    if (loop.variant && every > 1 && !has)
        fail_request("reuse=" + std::to_string(every) + ": the loop " + loop.name + " of " + manifest.name +
                     " has no shallow steps with " + loop.variant->control + "; leave out one of the two");
}

}  // namespace

double Request::number(const Scale& scale) const {
    if (scale.control.empty()) return scale.value;
    const auto& value = values.at(scale.control);
    return value ? value->numbers.front() : 0.0;
}

bool Request::runs(const Loop& loop) const {
    return !replaces(loop) && static_cast<std::int64_t>(frames) >= loop.least_frames;
}

Request make_request(const Manifest& manifest, const Tokenizer* tokenizer, const higen_request& asked,
                     const Tokenizer::Warn& warn) {
    const auto& sizes = manifest.sizes;
    auto given = asked;
    given.preset = preset_name(manifest, asked);
    Request request;
    request.frames = static_cast<std::size_t>(whole("frames", given.frames, sizes.fewest_frames, sizes.most_frames));
    request.height = side("height", given.height, sizes.multiple);
    request.width = side("width", given.width, sizes.multiple);
    request.fps = static_cast<std::int32_t>(whole("fps", given.fps, 1, 240));
    request.seed = given.seed;
    request.loops = loop_options(manifest, given, request.frames);
    take_controls(manifest, given, request, warn);
    check_needed(manifest, request);
    check_known(manifest, request);
    check_settings(manifest, given);
    for (std::size_t i = 0; i < manifest.loops.size(); ++i) {
        request.loops[i].settings =
            loop_settings(manifest, i, given, request.frames, request.begins(manifest.loops[i]));
        check_reuse(manifest, i, request);
    }
    request.inverted = given.inversion != nullptr;
    check_inversion(manifest, given, request);
    if (tokenizer != nullptr) take_texts(*tokenizer, given, warn, request);
    return request;
}

SolverTable inverse_rows(const Request& request, const Loop& loop, const LoopOptions& options) {
    const auto rows = solver_table(loop.schedule, loop.prediction, *options.solver, options.steps).rows.size();
    const auto first = tail_row(rows, request.number(loop.start->strength));
    return inversion_table(loop.schedule, loop.prediction, *options.solver, options.steps,
                           static_cast<std::int64_t>(first));
}

Request described(const Manifest& manifest, Request request) {
    request.tokens = std::move(request.inversion_tokens), request.weights = std::move(request.inversion_weights);
    request.inverted = false;
    for (const auto& loop : manifest.loops)
        if (loop.known)
            for (const auto& name : {loop.known->control, loop.known->mask})
                request.pictures.erase(name), request.places.erase(name);
    return request;
}

Request default_request(const Manifest& manifest) {
    const auto& sizes = manifest.sizes;
    Request request;
    request.frames = static_cast<std::size_t>(sizes.frames);
    request.height = static_cast<std::size_t>(sizes.height);
    request.width = static_cast<std::size_t>(sizes.width);
    request.fps = static_cast<std::int32_t>(sizes.fps);
    higen_request given{};
    take_controls(manifest, given, request, [](const std::string&) {});
    // A video from text, with the pictures that its loops and the decoder need in any case.
    const auto need = [&](const std::vector<std::string>& stages) {
        for (const auto& name : pictures_of(manifest, stages)) request.pictures[name];
    };
    need({manifest.sizes.decoder});
    for (const auto& loop : manifest.loops)
        if (!loop.replaced) need(loop.own().names());
    for (const auto& loop : manifest.loops)
        if (loop.start && loop.start->needed) request.pictures[loop.start->control];
    for (const auto& loop : manifest.loops)
        if (loop.replaced && !request.replaces(loop)) need(loop.own().names());
    if (request.pictures.empty()) given.preset = preset_name(manifest, given);
    request.loops = loop_options(manifest, given, request.frames);
    return request;
}

void check_batch(const Manifest& manifest, const std::vector<Request>& requests) {
    const auto& first = requests.front();
    for (std::size_t i = 1; i < requests.size(); ++i) {
        const auto& request = requests[i];
        const auto same = [&](const std::string& name, bool is_same) {
            if (!is_same)
                fail_request("requests[" + std::to_string(i) + "]: " + name +
                             " differs from requests[0]; all requests of a batch need the same");
        };
        same("frames", request.frames == first.frames);
        same("width", request.width == first.width);
        same("height", request.height == first.height);
        same("fps", request.fps == first.fps);
        same("inversion", request.inverted == first.inverted);
        for (std::size_t k = 0; k < request.loops.size(); ++k) {
            same("steps", request.loops[k].steps == first.loops[k].steps);
            same("solver", request.loops[k].solver == first.loops[k].solver);
            const auto &own = request.loops[k].settings, &others = first.loops[k].settings;
            same("guidance_interval", own.interval.from == others.interval.from && own.interval.to == others.interval.to);
            same("windows", own.windows == others.windows);
            same("free_init", own.free_init == others.free_init);
            same("reuse", own.reuse == others.reuse);
            same("preset", own.stretch == others.stretch);
            const auto& start = manifest.loops[k].start;
            if (start && first.has_picture(start->control))
                same("strength", request.number(start->strength) == first.number(start->strength));
        }
        for (const auto& control : manifest.controls)
            if (request.has_picture(control.name) != first.has_picture(control.name))
                fail_request("requests[" + std::to_string(i) + "]: " + control.name +
                             " must be given for all videos of a batch or for none");
    }
}

std::vector<Source> Request::standing(const Loop& loop) const {
    std::vector<Source> sources;
    if (replaces(loop)) sources.push_back(loop.replaced->latents);
    if (begins(loop)) sources.push_back(loop.start->latents);
    if (passes(loop)) sources.push_back(loop.known->latents);
    return sources;
}

std::vector<std::string> Request::stand_ins(const Loop& loop) const {
    std::vector<std::string> names;
    for (const auto& source : standing(loop)) names.push_back(source.name);
    return names;
}

std::vector<std::string> pictures_of(const Manifest& manifest, const std::vector<std::string>& stages) {
    std::vector<std::string> names;
    std::vector<std::pair<std::string, std::string>> open, seen;  // stage, and control that feeds it instead
    for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage) open.emplace_back(*stage, "");
    while (!open.empty()) {
        const auto at = open.back();
        open.pop_back();
        const auto* stage = manifest.find_stage(at.first);
        if (stage == nullptr || std::find(seen.begin(), seen.end(), at) != seen.end()) continue;
        seen.push_back(at);
        for (const auto& tensor : stage->inputs) {
            const auto& source = tensor.source;
            const bool replaced = source.shown && !at.second.empty();
            if (source.kind == Source::Kind::made && !replaced)
                open.emplace_back(source.name, source.given.empty() ? at.second : source.given);
            const bool placed = source.kind == Source::Kind::frames || source.kind == Source::Kind::places;
            if (source.kind != Source::Kind::picture && source.kind != Source::Kind::clip && !placed && !replaced)
                continue;
            const auto& name = at.second.empty() || placed ? source.name : at.second;
            if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
        }
    }
    return names;
}

}  // namespace higen::core
