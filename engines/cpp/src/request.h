// A generation request: every argument checked in one place, before any work starts (higen/request.py).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "higen/higen.h"
#include "loop_settings.h"
#include "manifest.h"
#include "tokenizer.h"

namespace higen::core {

// The options of a request for one loop.
struct LoopOptions {
    std::int64_t steps = 1;
    std::vector<float> guidance;     // one per frame of the loop
    const Solver* solver = nullptr;  // a row of the manifest
    LoopSettings settings;
};

// A checked request.
struct Request {
    std::vector<std::int64_t> tokens, negative_tokens;  // rows of the model's length; empty if it reads no text
    std::vector<float> weights, negative_weights;       // of the tokens; empty: all 1
    std::vector<std::int64_t> blank;                    // the row of an empty text, if texts can have several rows
    bool inverted = false;                              // the picture or clip to begin from is inverted into noise,
    std::vector<std::int64_t> inversion_tokens;         // with this text, as `tokens` and `weights`
    std::vector<float> inversion_weights;
    std::uint64_t seed = 0;
    std::vector<LoopOptions> loops;  // in the manifest's order
    std::size_t frames = 0;
    std::size_t height = 0;
    std::size_t width = 0;
    std::int32_t fps = 0;
    std::map<std::string, MaybeValue, std::less<>> values;            // of controls without pixels
    // By control, if given: [3, f, height, width] in -1 to 1; for a mask [f, height, width], brightness from 0 to 1.
    std::map<std::string, std::vector<float>, std::less<>> pictures;
    std::map<std::string, std::vector<std::size_t>, std::less<>> places;  // of known frames in the clip

    [[nodiscard]] bool has_picture(const std::string& control) const { return pictures.count(control) > 0; }
    // A number of the manifest: the number itself, or the value of the control that it names.
    [[nodiscard]] double number(const Scale& scale) const;
    // Whether a picture or clip of the request replaces a loop's result.
    [[nodiscard]] bool replaces(const Loop& loop) const { return loop.replaced && has_picture(loop.replaced->control); }
    // Whether a loop is run.
    [[nodiscard]] bool runs(const Loop& loop) const;
    // Whether a loop is run and begins in the table's tail, from a picture or clip of the request.
    [[nodiscard]] bool begins(const Loop& loop) const {
        return runs(loop) && loop.start && (loop.start->needed || has_picture(loop.start->control));
    }
    // Whether the picture or clip from which a loop begins is inverted into noise.
    [[nodiscard]] bool inverts(const Loop& loop) const { return inverted && begins(loop); }
    // Whether a loop is run and its result passes through known frames of the request.
    [[nodiscard]] bool passes(const Loop& loop) const {
        return runs(loop) && loop.known && has_picture(loop.known->control);
    }
    // The stages that do a loop's steps: the variant's, if the request gives the variant's control. A variant for known
    // frames is for whole frames, so it is not used with a mask.
    [[nodiscard]] StagePair pair(const Loop& loop) const {
        if (!loop.variant || !has_picture(loop.variant->control)) return loop.own();
        const bool masked = loop.known && loop.known->control == loop.variant->control && !loop.known->mask.empty() &&
                            has_picture(loop.known->mask);
        return masked ? loop.own() : loop.variant->stages;
    }
    // The sources of latents that replace a loop's result, that it begins from, or that it passes through.
    [[nodiscard]] std::vector<Source> standing(const Loop& loop) const;
    // The stages and loops of these sources; a loop among them has its own inputs.
    [[nodiscard]] std::vector<std::string> stand_ins(const Loop& loop) const;
};

// Check every argument against the model. `tokenizer`: null for a model that reads no text. `asked` was filled by
// higen_request_init and then changed by the caller.
[[nodiscard]] Request make_request(const Manifest& manifest, const Tokenizer* tokenizer, const higen_request& asked,
                                   const Tokenizer::Warn& warn);

// The rows that carry the picture or clip of a loop up to the noise level from which it is denoised. Throws a request
// error if the loop's solver cannot be run backwards.
[[nodiscard]] SolverTable inverse_rows(const Request& request, const Loop& loop, const LoopOptions& options);

// The request for the way up of an inversion: its prompt is the inversion's text, and it has no known frames.
[[nodiscard]] Request described(const Manifest& manifest, Request request);

// The request that sets nothing, without tokens. It shows which stages a model must load when it is opened.
[[nodiscard]] Request default_request(const Manifest& manifest);

// Check that requests can be made in one batch: they must agree in frames, size, rate, steps, solvers, settings of the
// loops, and names of pictures. Throws a request error.
void check_batch(const Manifest& manifest, const std::vector<Request>& requests);

// The pictures and clips that these stages, and the stages that feed them, need; each once.
[[nodiscard]] std::vector<std::string> pictures_of(const Manifest& manifest, const std::vector<std::string>& stages);

}  // namespace higen::core
