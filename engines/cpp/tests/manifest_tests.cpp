// Tests the manifest's reader: it reads an unknown model, and refuses every wrong table by name.
#include <string>
#include <vector>

#include "bundle.h"
#include "check.h"
#include "fixture.h"

using namespace higen::core;
using fixture::Json;
using fixture::manifest;
using fixture::parsed;

namespace {

// Check that the manifest with one change is refused with a message that contains `words`.
void refused(const std::string& words, const std::function<void(Json&)>& change,
             higen_status status = HIGEN_ERROR_MANIFEST) {
    auto json = manifest();
    change(json);
    const auto [found, message] = test::failure([&] { (void)parsed(json); });
    test::report(found == status && message.find(words) != std::string::npos, __FILE__, __LINE__,
                 words + ": " + higen_status_name(found) + ": " + message);
}

Json& row(Json& table, const char* name) {
    for (auto& one : table)
        if (one.at("name") == name) return one;
    throw std::runtime_error(std::string("no row ") + name);
}

Json& stage_row(Json& json, const char* name) { return row(json["stages"], name); }
Json& loop_row(Json& json, const char* name) { return row(json["loops"], name); }
Json& control_row(Json& json, const char* name) { return row(json["controls"], name); }
Json& input_row(Json& json, const char* stage, const char* name) { return row(stage_row(json, stage)["inputs"], name); }

}  // namespace

TEST(a_model_of_an_unknown_family_is_read) {
    const auto found = parsed(manifest());
    CHECK(found.name == "kites" && found.family == "a family that nobody has" && found.stages.size() == 9);
    CHECK((found.denoising() == std::vector<std::string>{"sketch", "sketch_plain", "film", "film_plain"}));
    CHECK(found.sizes.symbols.at("R") == 5 && found.sizes.fewest_frames == 1 && found.sizes.most_frames == 40);
    const auto& filming = *found.loop("filming");
    CHECK(filming.every_frame && filming.noise.offset->scale.control == "gust" && filming.start->strength.value == 0.5);
    CHECK(filming.solver("dpm++2m")->spacing == "trailing-ceil" && filming.solver("euler") == nullptr);
    CHECK(filming.guidance == std::vector<double>{2.0} && filming.stages().size() == 2);
    const auto& mood = found.stage("film").input("empty_mood")->source;
    CHECK(mood.negative && mood.name == "mixer" && to_text(mood) == "mixer@negative.mood");
    CHECK(found.control("mood")->standard->text == "calm" &&
          found.control("wind")->range() == "a number from 0 to 1000");
    CHECK(found.find_stage("unet") == nullptr &&
          found.stage("film").graph_output(found.stage("film").outputs[0]) == "next_latents");
    auto feeding = found.feeding({"film"});
    std::sort(feeding.begin(), feeding.end());
    CHECK((feeding == std::vector<std::string>{"film", "mixer", "reader"}));
}

TEST(a_loop_whose_latents_nothing_takes_is_left_out_of_longer_clips) {
    const auto names = [](const Json& json, std::size_t frames) {
        std::vector<std::string> found;
        const auto read = parsed(json);
        for (const auto* loop : read.wanted(frames)) found.push_back(loop->name);
        return found;
    };
    auto json = manifest();
    CHECK((names(json, 1) == std::vector<std::string>{"sketching"}));
    CHECK((names(json, 2) == std::vector<std::string>{"sketching", "filming"}));
    for (const auto* stage : {"film", "film_plain"}) {
        auto& inputs = stage_row(json, stage)["inputs"];
        const auto is_base = [](const Json& one) { return one["name"] == "base"; };
        inputs.erase(std::remove_if(inputs.begin(), inputs.end(), is_base), inputs.end());
    }
    CHECK((names(json, 1) == std::vector<std::string>{"sketching"}));
    CHECK((names(json, 2) == std::vector<std::string>{"filming"}));
    loop_row(json, "filming")["noise"]["mix"] = {{"loop", "sketching"}, {"scale", 1.0}};
    CHECK((names(json, 2) == std::vector<std::string>{"sketching", "filming"}));
}

TEST(versions) {
    auto json = manifest();
    json["version"] = 3;
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "version=3, but this higen reads version 2: a newer higen is needed", parsed(json));
    json["version"] = 1;
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "version=1, but this library reads version 2: higen upgrade models/kite",
                parse_manifest(json.dump(), "models/kite/higen.json"));
    // An old manifest has other keys, but the message is about its version.
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "higen upgrade",
                parse_manifest(R"({"format": "higen", "version": 1, "model": {}, "files": {}})", "m"));
    for (const Json& version : std::vector<Json>{true, 0, -1, 1.0, "2", nullptr}) {
        json["version"] = version;
        CHECK_FAILS(HIGEN_ERROR_MANIFEST, "version=", parsed(json));
    }
}

TEST(what_is_no_manifest) {
    const auto fails = [](const std::string& text, const char* words) {
        CHECK_FAILS(HIGEN_ERROR_MANIFEST, words, parse_manifest(text, "m"));
    };
    fails("", "not valid JSON");
    fails("[1]", "not a higen manifest");
    fails(R"({"format": "other", "version": 2})", "not a higen manifest");
    fails(R"({"format": "higen", "version": 2, "format": "higen"})", "appears twice");
    fails(std::string(100'000, '['), "not valid JSON");
    fails(R"({"format": "higen", "version": 2, "seal": )" + std::string(50'000, '[') + std::string(50'000, ']') + "}",
          "is missing");
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "not a model directory", Bundle("/nonexistent", true));
}

TEST(every_key_is_wanted_and_no_other) {
    const auto whole = manifest();
    for (const auto& item : whole.items()) {
        if (item.key() == "seal") continue;  // `parsed` adds it
        refused(item.key() == "format" ? "not a higen manifest" : item.key(),
                [&](Json& json) { json.erase(item.key()); });
    }
    // The same for every object at any depth, except for objects with names as keys.
    const std::vector<std::pair<std::string, std::function<Json&(Json&)>>> objects = {
        {"sizes", [](Json& json) -> Json& { return json["sizes"]; }},
        {"text", [](Json& json) -> Json& { return json["text"]; }},
        {"controls[0]", [](Json& json) -> Json& { return json["controls"][0]; }},
        {"stages[0]", [](Json& json) -> Json& { return json["stages"][0]; }},
        {"stages[0].inputs[0]", [](Json& json) -> Json& { return json["stages"][0]["inputs"][0]; }},
        {"stages[0].outputs[0]", [](Json& json) -> Json& { return json["stages"][0]["outputs"][0]; }},
        {"loops[1]", [](Json& json) -> Json& { return json["loops"][1]; }},
        {"loops[1].schedule", [](Json& json) -> Json& { return json["loops"][1]["schedule"]; }},
        {"loops[1].solvers[0]", [](Json& json) -> Json& { return json["loops"][1]["solvers"][0]; }},
        {"loops[1].noise", [](Json& json) -> Json& { return json["loops"][1]["noise"]; }},
        {"loops[1].noise.offset", [](Json& json) -> Json& { return json["loops"][1]["noise"]["offset"]; }},
        {"loops[0].replaced", [](Json& json) -> Json& { return json["loops"][0]["replaced"]; }},
        {"loops[1].start", [](Json& json) -> Json& { return json["loops"][1]["start"]; }},
    };
    for (const auto& [where, place] : objects) {
        auto other = whole;
        const Json object = place(other);
        for (const auto& item : object.items()) {
            refused(where + "." + item.key(), [&, find = place](Json& json) { find(json).erase(item.key()); });
            refused(where + "." + item.key(), [&, find = place](Json& json) {
                find(json)[item.key()] = item.value().is_string() ? Json(true) : Json("an unknown text");
            });
        }
        refused("\"colour\": unknown key", [find = place](Json& json) { find(json)["colour"] = 1; });
    }
    refused("\"colour\": unknown key", [](Json& json) { json["colour"] = 1; });
}

TEST(numbers_out_of_range) {
    refused("sizes.chunk=0", [](Json& json) { json["sizes"]["chunk"] = 0; });
    refused("sizes.multiple=5: a multiple of factor=2",
            [](Json& json) { json["sizes"]["factor"] = 2, json["sizes"]["multiple"] = 5; });
    refused("sizes.width=5000", [](Json& json) { json["sizes"]["width"] = 5000; });
    refused("1 <= fewest <= default <= most", [](Json& json) { json["sizes"]["frames"] = {3, 2, 4}; });
    refused("sizes.symbols.C=0", [](Json& json) { json["sizes"]["symbols"]["C"] = 0; });
    refused("a name other than B, F, N", [](Json& json) { json["sizes"]["symbols"]["F"] = 3; });
    refused("text: length=2", [](Json& json) { json["text"]["length"] = 2; });
    refused("a whole number", [](Json& json) { json["sizes"]["fps"] = 9223372036854775808ULL; });
    refused("a size from 1", [](Json& json) { input_row(json, "mixer", "words")["shape"][0] = 0; });
    refused("loops[0].steps=0: from 1 to 1000", [](Json& json) { json["loops"][0]["steps"] = 0; });
    refused("loops[0].guidance", [](Json& json) { json["loops"][0]["guidance"] = {1.0, -1.0}; });
    refused("loops[0].guidance", [](Json& json) { json["loops"][0]["guidance"] = Json::array(); });
    refused("loops[0].frames=2: 1 or 'F'", [](Json& json) { json["loops"][0]["frames"] = 2; });
    refused("loops[0].noise.purpose=-1", [](Json& json) { json["loops"][0]["noise"]["purpose"] = -1; });
    refused("a stride from 1 to the length",
            [](Json& json) { json["loops"][1]["windows"] = {{"length", 4}, {"stride", 5}}; });
    refused("loops[0].schedule: ", [](Json& json) { json["loops"][0]["schedule"]["beta_start"] = 0.5; });
    refused("loops[0].solvers[0]: ", [](Json& json) { json["loops"][0]["solvers"][0]["name"] = "plms"; });
    refused("dpm++2m appears twice",
            [](Json& json) { json["loops"][0]["solvers"][0] = json["loops"][0]["solvers"][1]; });
    refused("loops[0]: zero_terminal_snr=true: prediction='epsilon'",
            [](Json& json) { json["loops"][0]["prediction"] = "epsilon"; });
}

TEST(controls_that_contradict_themselves) {
    refused("controls[2].default=-1.0: a number from 0",
            [](Json& json) { control_row(json, "gust")["default"] = -1.0; });
    refused("controls[3].default=1.5: a whole number", [](Json& json) { control_row(json, "pace")["default"] = 1.5; });
    refused("one of the choices", [](Json& json) { control_row(json, "mood")["default"] = "sad"; });
    refused("low must be at most high", [](Json& json) { control_row(json, "wind")["low"] = 2000; });
    refused("needs a default unless it is optional",
            [](Json& json) { control_row(json, "gust")["default"] = nullptr; });
    refused("only with the encoding sinusoid", [](Json& json) { control_row(json, "gust")["optional"] = true; });
    refused("controls[0].usual: only for a curve: two numbers",
            [](Json& json) { control_row(json, "wind")["usual"] = {5, 5}; });
    refused("controls[0].usual=", [](Json& json) { control_row(json, "wind")["usual"] = {5}; });
    refused("controls[2].usual: only for a curve", [](Json& json) { control_row(json, "gust")["usual"] = {0, 1}; });
    refused("controls[2].name='seed'", [](Json& json) { control_row(json, "gust")["name"] = "seed"; });
    refused("controls[2].name='2nd'", [](Json& json) { control_row(json, "gust")["name"] = "2nd"; });
    refused("controls[0].encoding=number", [](Json& json) { control_row(json, "wind")["encoding"] = "number"; });
    refused("choices: for a choice, and only for a choice",
            [](Json& json) { control_row(json, "gust")["choices"] = {"a"}; });
    refused("one of 'number', 'whole', 'curve', 'text'",
            [](Json& json) { control_row(json, "gust")["kind"] = "colour"; });
    refused("controls: wind appears twice", [](Json& json) { json["controls"].push_back(json["controls"][0]); });
}

TEST(references_between_the_tables) {
    refused("source scribbler.words: the stages are reader, mixer",
            [](Json& json) { input_row(json, "mixer", "words")["source"] = "scribbler.words"; });
    refused("source reader.letters: reader gives words",
            [](Json& json) { input_row(json, "mixer", "words")["source"] = "reader.letters"; });
    refused("source sketch.latents: a denoising stage is run by its loop; take LOOP.latents",
            [](Json& json) { input_row(json, "film", "base")["source"] = "sketch.latents"; });
    refused("source sketching@negative.latents: a loop gives only latents",
            [](Json& json) { input_row(json, "film", "base")["source"] = "sketching@negative.latents"; });
    refused("stages[1].inputs[0].source='words of the reader': state, control:NAME",
            [](Json& json) { input_row(json, "mixer", "words")["source"] = "words of the reader"; });
    refused("the controls of this kind are wind, drift, gust, pace, mood",
            [](Json& json) { input_row(json, "mixer", "wind")["source"] = "control:rain"; });
    refused("the controls of this kind are photo",
            [](Json& json) { input_row(json, "scanner", "pixels")["source"] = "picture:reel"; });
    refused("source picture:brush.pixels: the stages are reader, mixer",
            [](Json& json) { input_row(json, "scanner", "pixels")["source"] = "picture:brush.pixels"; });
    refused("source picture:reader.pixels:clip: reader gives words",
            [](Json& json) { input_row(json, "scanner", "pixels")["source"] = "picture:reader.pixels:clip"; });
    refused("source picture:reader.words: [N, 3, Y, X] or [B, 3, F, Y, X] is wanted, not",
            [](Json& json) { input_row(json, "scanner", "pixels")["source"] = "picture:reader.words"; });
    refused("source='picture:reader@negative.words': state, control:NAME",
            [](Json& json) { input_row(json, "scanner", "pixels")["source"] = "picture:reader@negative.words"; });
    refused("the encoding sinusoid gives 3 axes, not 2",
            [](Json& json) { input_row(json, "mixer", "wind")["shape"] = {"B", "F"}; });
    refused("stages.mixer.words: 'Q': a size, one of B, F, N, H, W, Y, X, or a name in sizes.symbols",
            [](Json& json) { input_row(json, "mixer", "words")["shape"] = {"B", "Q", "T"}; });
    refused("source text:prompt, but text is null", [](Json& json) { json["text"] = nullptr; });
    refused("tokens are int64", [](Json& json) { input_row(json, "reader", "ids")["dtype"] = "float32"; });
    refused("the sources form a circle: reader <- mixer <- reader", [](Json& json) {
        stage_row(json, "reader")["inputs"].push_back(fixture::input("mood", {"B", "K"}, "mixer.mood"));
    });
    refused("the sources form a circle: reader <- reader", [](Json& json) {
        stage_row(json, "reader")["inputs"].push_back(fixture::input("w", {"B", "L", "T"}, "reader.words"));
    });
    refused("filming appears twice", [](Json& json) { loop_row(json, "sketching")["name"] = "filming"; });
    refused("mixer appears twice", [](Json& json) { loop_row(json, "filming")["name"] = "mixer"; });
    refused("stages.reader.inputs: ids appears twice",
            [](Json& json) { stage_row(json, "reader")["inputs"].push_back(json["stages"][0]["inputs"][0]); });
    refused("sizes.decoder='brush': the stages are", [](Json& json) { json["sizes"]["decoder"] = "brush"; });
    refused("one input with the source state", [](Json& json) { json["sizes"]["decoder"] = "scanner"; });
    refused("letters, digits and _", [](Json& json) { stage_row(json, "reader")["name"] = "the reader"; });
}

TEST(loops_that_cannot_run) {
    refused("loops.sketching.guided='brush': the stages are", [](Json& json) { json["loops"][0]["guided"] = "brush"; });
    refused("must give only latents and previous", [](Json& json) { json["loops"][0]["guided"] = "painter"; });
    refused("its state inputs must be A, B, C, alpha, guidance, latents",
            [](Json& json) { json["loops"][0]["guided"] = "sketch_plain"; });
    refused("its state inputs must be A, B, C, alpha, latents",
            [](Json& json) { json["loops"][0]["plain"] = "sketch"; });
    refused("guided, plain: at least one stage",
            [](Json& json) { json["loops"][0]["guided"] = json["loops"][0]["plain"] = nullptr; });
    refused("needs the latents of sketching, which runs later",
            [](Json& json) { std::swap(json["loops"][0], json["loops"][1]); });
    refused("noise.mix.loop='dreaming': an earlier loop",
            [](Json& json) { json["loops"][1]["noise"]["mix"] = {{"loop", "dreaming"}, {"scale", 1}}; });
    refused("the sources form a circle: filming <- filming",
            [](Json& json) { json["loops"][1]["noise"]["mix"] = {{"loop", "filming"}, {"scale", 1}}; });
    refused("loops.filming.noise.offset.scale='control:wind'",
            [](Json& json) { json["loops"][1]["noise"]["offset"]["scale"] = "control:wind"; });
    refused("loops.sketching.controls.photo: the controls with numbers are",
            [](Json& json) { json["loops"][0]["controls"]["photo"] = 1; });
    refused("replaced.control='wind': the pictures and clips are photo, reel",
            [](Json& json) { json["loops"][0]["replaced"]["control"] = "wind"; });
    refused("stages, loops: from 1 to 100 rows each", [](Json& json) { json["loops"] = Json::array(); });
    refused("its noise is mixed with sketching, but sketching is left out for shorter clips", [](Json& json) {
        json["loops"][0]["least_frames"] = 3;
        json["loops"][1]["noise"]["mix"] = {{"loop", "sketching"}, {"scale", 1}};
    });
    refused("loops.sketching: is left out for clips of 2 frames, but film needs its latents", [](Json& json) {
        json["loops"][1]["least_frames"] = json["sizes"]["frames"][0] = 2;
        json["loops"][0]["least_frames"] = 3;
    });
    refused("a clip of 2 frames needs a last loop with frames 'F'",
            [](Json& json) { json["loops"][1]["least_frames"] = 4; });
    refused("loops.filming.start.strength: a number from 0 to 1",
            [](Json& json) { json["loops"][1]["start"]["strength"] = 1.5; });
    refused("loops.sketching.controls.wind=-1.000000: a number from 0 to 1000",
            [](Json& json) { json["loops"][0]["controls"]["wind"] = -1; });
    refused("replaced.latents: source text:prompt: STAGE.OUTPUT or LOOP.latents",
            [](Json& json) { json["loops"][0]["replaced"]["latents"] = "text:prompt"; });
    refused("replaced.latents: source reader.words has 3 axes, not 5",
            [](Json& json) { json["loops"][0]["replaced"]["latents"] = "reader.words"; });
}

TEST(presets_that_do_not_fit_the_loops) {
    const auto with = [](const char* key, Json value) {
        return [key, value = std::move(value)](Json& json) {
            json["loops"][1]["stretch"] = {{"loop", "sketching"}, {"by", 1.0}};
            const Json none = {nullptr, nullptr};
            json["presets"] = Json::array({{{"name", "fast"}, {"steps", none}, {"guidance", none}, {"stretch", none}}});
            json["presets"][0][key] = value;
        };
    };
    refused("presets.fast.steps: 2 entries, one per loop, not 1", with("steps", {2}));
    refused("presets.fast.steps has 0 for the loop filming: null, or from 1 to 1000", with("steps", {2, 0}));
    refused("presets.fast.guidance has -1.000000 for the loop sketching", with("guidance", {-1, 1}));
    refused("presets.fast.stretch has 2.000000 for the loop sketching, but loops.sketching.stretch is null",
            with("stretch", {2.0, nullptr}));
    refused("stretch=101.000000: a number from 0 to 100", with("stretch", {nullptr, 101}));
    refused("name='very fast': letters, digits and _", with("name", "very fast"));
    refused("presets[0].usual", with("usual", 1));
    refused("presets: fast, slow are usual; at most one is", [](Json& json) {
        const Json none = {nullptr, nullptr};
        for (const auto* name : {"fast", "slow"})
            json["presets"].push_back(
                {{"name", name}, {"steps", none}, {"guidance", none}, {"stretch", none}, {"usual", true}});
    });
    refused("loops.filming.stretch.loop='dreaming': an earlier loop",
            [](Json& json) { json["loops"][1]["stretch"] = {{"loop", "dreaming"}, {"by", 1}}; });
    refused("stretch.by=-1.000000: a number from 0 to 100",
            [](Json& json) { json["loops"][1]["stretch"] = {{"loop", "sketching"}, {"by", -1}}; });
    refused("presets: fast appears twice", [&](Json& json) {
        with("name", "fast")(json);
        json["presets"].push_back(json["presets"][0]);
    });
}

TEST(decoders_for_previews_that_do_not_fit) {
    CHECK(fixture::parsed(fixture::with_preview()).sizes.preview->decoder == "dauber");
    const auto wrong = [](const char* said, const char* key, Json value) {
        auto json = fixture::with_preview();
        json["sizes"]["preview"][key] = std::move(value);
        CHECK_FAILS(HIGEN_ERROR_MANIFEST, said, fixture::parsed(json));
    };
    wrong("sizes.preview.decoder='brush': the stages are", "decoder", "brush");
    wrong("sizes.preview.decoder='mixer': one input with the source state", "decoder", "mixer");
    wrong("sizes.preview.decoder='painter': another stage than sizes.decoder", "decoder", "painter");
    wrong("sizes.preview.control='gust': the controls of kind choice are", "control", "gust");
    wrong("sizes.preview.choice='full'", "choice", "full");
    wrong("sizes.preview.choice='tiny'", "choice", "tiny");
    wrong("sizes.preview.\"size\": unknown key", "size", 2);
    auto json = fixture::with_preview();
    json["stages"].back()["inputs"][0]["shape"] = {"N", 7, "H", "W"};
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "its latents have 7 channels, but those of sizes.decoder have 4",
                fixture::parsed(json));
}

TEST(axes_of_a_denoising_stage) {
    refused("latents are [B, C, 1, H, W], C of a fixed size, not [B, C, 1, H]",
            [](Json& json) { input_row(json, "sketch", "latents")["shape"] = {"B", "C", 1, "H"}; });
    refused("latents are [B, C, F, H, W], C of a fixed size",
            [](Json& json) { input_row(json, "film", "latents")["shape"] = {"B", "N", "F", "H", "W"}; });
    refused("previous is float32 [B, C, F, H, W], not [B, C, F, H, H]",
            [](Json& json) { input_row(json, "film", "previous")["shape"] = {"B", "C", "F", "H", "H"}; });
    refused("guidance is float32 [B, F], not [B]",
            [](Json& json) { input_row(json, "film", "guidance")["shape"] = {"B"}; });
    refused("t is float32 [B]", [](Json& json) { input_row(json, "film", "t")["dtype"] = "int64"; });
    refused("batch is true, but the first axes are not all B, or all N",
            [](Json& json) { input_row(json, "film", "mood")["shape"] = {"N", "K"}; });
    refused("batch must be true", [](Json& json) { stage_row(json, "film")["batch"] = false; });
    refused("tokens are [B, 4], not [B, L, T]",
            [](Json& json) { input_row(json, "reader", "ids")["shape"] = {"B", "L", "T"}; });
    refused("needs a last axis of a fixed size",
            [](Json& json) { input_row(json, "mixer", "wind")["shape"] = {"B", "F", "N"}; });
    refused("stages.mixer.words: source reader.words has 3 axes, not 2",
            [](Json& json) { input_row(json, "mixer", "words")["shape"] = {"B", "L"}; });
    refused("source picture:photo: 4 axes",
            [](Json& json) { input_row(json, "scanner", "pixels")["shape"] = {"N", 3, 3, "Y", "X"}; });
    refused("stages.scanner.latents: N is not an axis of any of its inputs",
            [](Json& json) { input_row(json, "scanner", "pixels")["shape"] = {3, 3, "Y", "X"}; });
    refused("one input with the source state, [N, C, H, W] and the output [N, 3, Y, X]",
            [](Json& json) { stage_row(json, "painter")["outputs"][0]["shape"] = {"N", 4, "Y", "X"}; });
    refused("at least one axis", [](Json& json) { input_row(json, "mixer", "words")["shape"] = Json::array(); });
}

TEST(files_and_graphs) {
    const Json record = {{"size", 1}, {"sha256", std::string(64, 'a')}};
    for (const char* name : {"../up", "/root", "a//b", "", "c:x", "a\\..\\b", "higen.json"})
        refused("a path inside", [&](Json& json) { json["files"][name] = record; });
    refused("a path inside", [&](Json& json) { json["files"][std::string("nul\0", 4)] = record; });
    refused("film.onnx: graphs must have one row for each .onnx file",
            [&](Json& json) { json["files"]["film.onnx"] = record; });
    refused("film.onnx: graphs must have one row for each .onnx file",
            [&](Json& json) { json["graphs"]["film.onnx"] = {{"inputs", Json::array()}}; });
    refused(
        "no file has this size", [](Json& json) { json["files"]["a"] = {{"size", -1}, {"sha256", ""}}; },
        HIGEN_ERROR_INTEGRITY);
    for (const Json& size : std::vector<Json>{0, -1, "", 1.5, nullptr})
        refused("graphs.film.onnx.inputs[0].shape[1]", [&](Json& json) {
            json["files"]["film.onnx"] = record;
            json["graphs"]["film.onnx"] = {{"inputs", {{{"name", "t"}, {"dtype", "int64"}, {"shape", {"B", size}}}}}};
        });
    auto json = manifest();
    json["files"]["film.onnx"] = record;
    json["graphs"]["film.onnx"] = {{"inputs", {{{"name", "t"}, {"dtype", "int64"}, {"shape", {"B", 3}}}}}};
    const auto found = parsed(json);
    CHECK(found.graphs.at("film.onnx").front().shape[1].size == 3 && found.files.at("film.onnx").size == 1);
}

TEST(a_seal_covers_the_tables) {
    auto text = fixture::sealed(manifest());
    (void)parse_manifest(text, "m");
    const auto at = text.find("\"fps\": 8");
    text[at + 7] = '9';
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "was edited after it was written",
                parse_manifest(text, "models/kite/higen.json"));
    CHECK_FAILS(HIGEN_ERROR_INTEGRITY, "higen upgrade --reseal models/kite",
                parse_manifest(text, "models/kite/higen.json"));
    auto json = manifest();
    json["seal"] = "zz";
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "64 hexadecimal digits", parse_manifest(json.dump(), "m"));
    // A wrong row is reported before a broken seal.
    json = manifest();
    json["loops"][0]["steps"] = 0;
    CHECK_FAILS(HIGEN_ERROR_MANIFEST, "steps=0", parse_manifest(json.dump(), "m"));
}
