#include "fuzz_targets.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "bundle.h"
#include "errors.h"
#include "plans.h"
#include "prompt_weights.h"
#include "request.h"
#include "text.h"
#include "tokenizer.h"

using namespace higen::core;

namespace fuzz {
namespace {

std::string_view view(const std::uint8_t* data, std::size_t size) {
    return {reinterpret_cast<const char*>(data), size};
}

// Any exception other than this library's own error is a bug.
template <typename Work>
void only_typed_errors(const Work& work) {
    try {
        work();
    } catch (const Error& error) {
        if (error.status() == HIGEN_OK || *error.what() == '\0') std::abort();
    }
}

}  // namespace

// A fuzzer does not find a valid seal by chance, so the bytes get the seal that fits them.
void sealed_manifest(const std::uint8_t* data, std::size_t size) {
    auto text = std::string(view(data, size));
    const auto key = text.find("\"seal\": \"");
    if (key == std::string::npos || key + 9 + 64 > text.size()) return;
    const auto seal = text.substr(key + 9, 64);
    const std::string none(64, '0');
    text.replace(key + 9, 64, none);
    text.replace(key + 9, 64, seal_of(text, none));
    manifest(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
}

void manifest(const std::uint8_t* data, std::size_t size) {
    only_typed_errors([&] {
        const auto found = parse_manifest(view(data, size), "fuzz");
        const auto& sizes = found.sizes;
        if (sizes.factor < 1 || sizes.multiple % sizes.factor != 0 || found.loops.empty()) std::abort();
        if (found.find_stage(sizes.decoder) == nullptr) std::abort();
        for (const auto& loop : found.loops)
            for (const auto& name : loop.stages())
                if (found.find_stage(name) == nullptr || found.feeding({name}).empty()) std::abort();
        only_typed_errors([&] {
            const auto request = default_request(found);
            if (request.loops.size() != found.loops.size()) std::abort();
        });
    });
}

void record(const std::uint8_t* data, std::size_t size) {
    only_typed_errors([&] {
        const Plan plan{"fuzz.engine", parse_record(view(data, size), "fuzz")};
        const auto& found = plan.record;
        Files files;
        for (const auto& [name, sha256] : {std::pair(found.graph, found.graph_sha256),
                                           std::pair(found.weights, found.weights_sha256)})
            files[name].sha256 = sha256;
        only_typed_errors([&] { check_plan(plan, files, 89, {{found.flavour, found.library}}); });
        Stage decoder;
        decoder.name = "vae_decoder";
        decoder.inputs = {{"latents", std::vector<Axis>(4), true, {}}};
        decoder.outputs = {{"pixels", std::vector<Axis>(4), true, {}}};
        only_typed_errors([&] { check_interface(plan, decoder, found.tensors); });
        for (const std::int64_t side : {1, 8, 4096})
            only_typed_errors([&] {
                const auto i = best_profile(plan, {{"latents", {1, 4, side, side}}});
                if (!found.profiles.at(i).holds({{"latents", {1, 4, side, side}}})) std::abort();
            });
    });
}

void tokenizer(const std::uint8_t* data, std::size_t size) {
    only_typed_errors([&] {
        TextRules rules;
        rules.length = 9;
        rules.clean = size % 2 == 0;
        const Tokenizer made(view(data, size), "fuzz", rules);
        for (const char* prompt : {"", "a blue whale's tail, 3.14!", "\xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80"})
            if (made.encode(prompt).size() != 9) std::abort();
    });
}

void text(const std::uint8_t* data, std::size_t size) {
    only_typed_errors([&] {
        const auto decoded = decode_utf8(view(data, size));
        if (!decoded) return;
        if (encode_utf8(*decoded) != view(data, size)) std::abort();
        const auto cleaned = clean(*decoded);
        if (clean(cleaned) != cleaned && lower(cleaned) != cleaned) std::abort();
    });
    only_typed_errors([&] {
        const auto decoded = decode_utf8(view(data, size));
        if (!decoded) return;
        std::size_t letters = 0;
        for (const auto& piece : pieces(*decoded, "fuzz")) letters += piece.text ? piece.text->size() : 0;
        if (letters > decoded->size()) std::abort();
    });
}

}  // namespace fuzz
