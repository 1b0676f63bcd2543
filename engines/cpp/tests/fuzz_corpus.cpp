// A seeded run over damaged models: fuzz_corpus MODEL FOLDER [SEED [ROUNDS]]
//
// Mutates the manifest, the tokenizer and random texts in memory, thousands of times; then writes damaged copies of the
// model into FOLDER - mutated manifests, truncated and exchanged graphs and weights, other sizes - and opens and runs
// them through the C interface. Every outcome must be a status. A crash, a sanitizer's report or an unexpected success
// ends the program.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "bundle.h"
#include "fuzz_targets.h"
#include "higen/higen.h"
#include "sha256.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace {

class Mutator {
public:
    explicit Mutator(std::uint64_t seed) : random_(seed) {}

    std::size_t below(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random_); }

    // Flips, removes or repeats bytes, or replaces them by bytes that have a meaning in JSON and UTF-8.
    std::string mutate(std::string text) {
        static const std::vector<std::string> words = {
            "-1", "0", "1e400", "1e308", "null", "true", "[]", "{}", "\"\"", "9223372036854775807", "18446744073709551616",
            "0.5", "NaN", "\"../x\"", "\\u0000", "\\ud800", "\xff", "\xc3", "\xef\xbb\xbf", "[[[[[[[[", "}", ",", ":",
            "\"stages\"", "\"size\"", "\"F\"", "\"state\"", "\"control:motion\"", "4096", "1048577", "\xc3\x83\xc2\xa9", "&amp;", "\x1b[3", "\xcc\x81"};
        for (std::size_t n = 1 + below(4); n > 0; --n) {
            const auto at = below(text.size() + 1), length = std::min(below(12), text.size() - at);
            switch (below(5)) {
                case 0:
                    if (at < text.size()) text[at] = static_cast<char>(below(256));
                    break;
                case 1: text.erase(at, length); break;
                case 2: text.insert(at, words[below(words.size())]); break;
                case 3: text.replace(at, length, words[below(words.size())]); break;
                default: text.insert(below(text.size() + 1), text.substr(at, length)); break;
            }
        }
        if (below(20) == 0) text.resize(below(text.size() + 1));
        return text;
    }

    // Replaces one value somewhere in a JSON document by another.
    void mutate(Json& json) {
        static const std::vector<Json> values = {nullptr, true, false, -1, 0, 1, 2, 31, 32, 64, 4096, 1e300, 0.5, "", "x",
                                                 Json::array(), Json::object(), Json::array({1}), 1ULL << 62};
        if (json.is_structured() && !json.empty() && below(8) != 0) {
            auto item = json.begin();
            std::advance(item, static_cast<long>(below(json.size())));
            if (below(12) == 0)
                json.erase(item);
            else
                mutate(*item);
        } else {
            json = values[below(values.size())];
        }
    }

private:
    std::mt19937_64 random_;
};

// The record of an engine, as `higen-export build-engines` writes it.
const std::string engine_record = R"({
 "stage": "vae_decoder", "target": "rtx-sm89", "precision": "fp16", "flavour": "rtx", "library": "1.7.1.116",
 "architectures": [86, 89], "graph": "vae_decoder.fp16.onnx", "graph_sha256": "11", "weights": "vae.fp16.safetensors",
 "weights_sha256": "22",
 "tensors": [{"name": "latents", "kind": "input", "dtype": "float32", "shape": [-1, 4, -1, -1]},
             {"name": "pixels", "kind": "output", "dtype": "float32", "shape": [-1, 3, -1, -1]}],
 "profiles": [{"name": "default", "spans": [
   {"name": "latents", "smallest": [1, 4, 8, 8], "best": [2, 4, 8, 8], "largest": [2, 4, 64, 64]}]}],
 "options": {"workspace": null, "weight_streaming": false}, "size": 123456, "sha256": "33",
 "built": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "format": 1})";

void write(const fs::path& path, const std::string& content) {
    fs::remove(path);
    std::ofstream(path, std::ios::binary) << content;
}

// A copy of a model. Its files are links until they are changed.
class Copy {
public:
    Copy(const fs::path& model, fs::path folder) : folder_(std::move(folder)), manifest_(Json::parse(higen::core::read_file(model / "higen.json"))) {
        fs::remove_all(folder_);
        fs::create_directories(folder_);
        for (const auto& item : manifest_.at("files").items())
            fs::create_symlink(fs::absolute(model / item.key()), folder_ / item.key());
    }

    [[nodiscard]] std::string read(const std::string& name) const { return higen::core::read_file(folder_ / name); }
    [[nodiscard]] Json& manifest() { return manifest_; }

    // Replace a file by `content`, and enter it in the manifest as if it belonged there.
    void replace(const std::string& name, const std::string& content) {
        write(folder_ / name, content);
        higen::core::Sha256 hash;
        hash.update(content.data(), content.size());
        manifest_["files"][name] = {{"size", content.size()}, {"sha256", hash.hex()}};
    }

    // Open the model and, if that works, make a tiny video.
    higen_status run(const std::string& manifest) const {
        write(folder_ / "higen.json", manifest);
        higen_model_options options = HIGEN_MODEL_OPTIONS_INIT;
        options.threads = 1;
        options.skip_verification = 1;  // the checks take most of the time of opening
        higen_model* model = nullptr;
        auto status = higen_model_open(folder_.u8string().c_str(), &options, &model);
        if (status == HIGEN_OK) {
            higen_model_info info = HIGEN_MODEL_INFO_INIT;
            higen_request request;
            if (higen_model_describe(model, &info) != HIGEN_OK || higen_request_init(model, &request) != HIGEN_OK) std::abort();
            const std::int32_t steps = 1;
            request.prompt = "a whale";
            request.frames = 2;
            request.steps = &steps, request.step_count = 1;
            request.width = request.height = info.size_multiple;
            status = higen_generate(model, &request, nullptr);
        }
        const std::string message = higen_last_error();
        if (status == HIGEN_ERROR_INTERNAL || (status != HIGEN_OK) == message.empty()) {
            std::fprintf(stderr, "%s: %s\n", higen_status_name(status), message.c_str());
            std::abort();
        }
        higen_model_close(model);
        return status;
    }
    [[nodiscard]] higen_status run() const { return run(sealed(manifest_)); }

    // The text of a manifest with the seal that its tables have.
    static std::string sealed(Json json) {
        const std::string none(64, '0');
        json["seal"] = none;
        auto text = json.dump();
        return text.replace(text.find(none), none.size(), higen::core::seal_of(text, none));
    }

private:
    fs::path folder_;
    Json manifest_;
};

void must_fail(higen_status status, const std::string& what) {
    if (status != HIGEN_OK) return;
    std::fprintf(stderr, "%s: was accepted\n", what.c_str());
    std::abort();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fputs("usage: fuzz_corpus MODEL FOLDER [SEED [ROUNDS]]\n", stderr);
        return 2;
    }
    const fs::path model = argv[1], folder = argv[2];
    const std::uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
    const std::size_t rounds = argc > 4 ? std::strtoull(argv[4], nullptr, 10) : 20;
    Mutator mutator(seed);
    std::map<std::string, std::size_t> outcomes;
    const auto note = [&](higen_status status) { ++outcomes[higen_status_name(status)]; };

    const auto manifest = higen::core::read_file(model / "higen.json");
    const auto tokenizer = higen::core::read_file(model / "tokenizer.json");
    const std::vector<std::string> tables = {"stages", "loops", "controls", "sizes", "text", "graphs", "files", "prompts"};
    const auto bytes = [](const std::string& text) { return reinterpret_cast<const std::uint8_t*>(text.data()); };
    for (std::size_t i = 0; i < 100 * rounds; ++i) {
        auto json = Json::parse(manifest);
        const auto& table = tables[mutator.below(tables.size())];
        mutator.mutate(json[table]);
        for (const auto& text : {mutator.mutate(manifest), json.dump(1)}) {
            fuzz::manifest(bytes(text), text.size());
            fuzz::sealed_manifest(bytes(text), text.size());
        }
        auto tokens = Json::parse(tokenizer);
        mutator.mutate(tokens);
        for (const auto& text : {mutator.mutate(tokenizer), tokens.dump()}) fuzz::tokenizer(bytes(text), text.size());
        auto record = Json::parse(engine_record);
        mutator.mutate(record);
        for (const auto& text : {mutator.mutate(engine_record), record.dump()}) fuzz::record(bytes(text), text.size());
        const auto text = mutator.mutate(mutator.mutate("A \xe2\x80\x9c" "caf\xc3\xa9\xe2\x80\x9d \xce\xa3\xce\xb1\xcf\x83 \xe6\x97\xa5 don't"));
        fuzz::text(bytes(text), text.size());
    }

    // Whole models, the cheapest cases first: most manifests are refused before a graph is read.
    if (const auto status = Copy(model, folder).run(); status != HIGEN_OK) {
        std::fprintf(stderr, "the model itself: %s: %s\n", higen_status_name(status), higen_last_error());
        return EXIT_FAILURE;
    }
    for (std::size_t i = 0; i < rounds / 2; ++i) {
        Copy copy(model, folder);
        note(copy.run(mutator.mutate(manifest)));
        auto json = Json::parse(manifest);
        mutator.mutate(json[tables[mutator.below(3)]]);
        note(copy.run(Copy::sealed(json)));
    }
    // The graphs that the default request needs, in loading order.
    std::vector<std::string> graphs;
    for (const auto* stage : {"text_encoder", "conditioner", "spatial_unet", "temporal_unet_plain", "vae_decoder"})
        graphs.push_back(higen::core::graph_file(stage));
    for (const auto& name : graphs) {
        Copy truncated(model, folder);
        const auto content = truncated.read(name);
        truncated.replace(name, content.substr(0, mutator.below(content.size())));
        const auto status = truncated.run();
        must_fail(status, "a truncated " + name);
        note(status);

        // Later stages cost more, because other graphs are loaded first. A short run continues with the first two only.
        if (rounds < 20 && name != graphs[0] && name != graphs[1]) continue;
        Copy exchanged(model, folder);
        const auto& other = graphs[(mutator.below(graphs.size() - 1) + 1 +
                                    static_cast<std::size_t>(std::find(graphs.begin(), graphs.end(), name) - graphs.begin())) %
                                   graphs.size()];
        exchanged.replace(name, exchanged.read(other));
        const auto second = exchanged.run();
        must_fail(second, other + " as " + name);
        note(second);

        Copy empty(model, folder);
        empty.replace(name, "");
        const auto third = empty.run();
        must_fail(third, "an empty " + name);
        note(third);
    }
    for (const auto* name : {"unet.safetensors", "vae.safetensors", "text_encoder.safetensors"}) {
        Copy copy(model, folder);
        const auto content = copy.read(name);
        copy.replace(name, content.substr(0, content.size() / 2));
        const auto status = copy.run();
        must_fail(status, std::string("half of ") + name);
        note(status);
    }
    for (const auto* symbol : {"Dt", "K", "C", "R", "L"}) {
        Copy copy(model, folder);
        auto& value = copy.manifest()["sizes"]["symbols"][symbol];
        value = value.get<int>() + 1;
        const auto status = copy.run();
        must_fail(status, std::string(symbol) + " one larger");
        note(status);
    }
    {
        Copy copy(model, folder);  // frame sizes that the decoder does not make
        copy.manifest()["sizes"]["factor"] = 8;
        const auto status = copy.run();
        must_fail(status, "another factor");
        note(status);
    }
    {
        Copy copy(model, folder);  // tables that were edited
        copy.manifest()["sizes"]["fps"] = 9;
        const auto status = copy.run(copy.manifest().dump());
        must_fail(status, "a broken seal");
        note(status);
    }
    fs::remove_all(folder);
    for (const auto& [status, n] : outcomes) std::printf("%s: %zu\n", status.c_str(), n);
    return EXIT_SUCCESS;
}
