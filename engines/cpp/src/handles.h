// What the handles of the C interface stand for. A handle is a number that is never given twice: one that was closed, and
// one that is none, are found out, and no call can reach freed memory.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <filesystem>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bundle.h"
#include "higen/higen.h"
#include "pipeline.h"
#include "router.h"
#include "tokenizer.h"

namespace higen::c_api {

// Generations that are stopped together: those of a model, those that were given one token.
class Stoppable {
public:
    // Stop those that run now.
    void stop();
    // Stop those that run now, and each later one as it begins.
    void stop_for_good(const char* why);

    // While this lives, a generation is one of them.
    class Member {
    public:
        Member(Stoppable& group, core::Cancellation& cancellation);
        ~Member();
        Member(const Member&) = delete;
        Member& operator=(const Member&) = delete;

    private:
        Stoppable& group_;
        std::list<core::Cancellation*>::iterator place_;
    };

private:
    std::mutex mutex_;
    std::list<core::Cancellation*> running_;
    const char* why_ = nullptr;  // not null: stopped for good
};

// An opened model.
struct OpenModel {
    core::Bundle bundle;
    std::optional<core::Tokenizer> tokenizer;  // none where the model reads no text
    std::unique_ptr<core::Router> router;
    core::Pipeline pipeline;
    mutable std::mutex mutex;
    mutable std::set<std::string> reports;                    // those handed out
    std::vector<std::vector<const char*>> solvers, choices;  // of each loop and control, for the C interface

    OpenModel(const std::filesystem::path& path, const core::BackendOptions& options);

    [[nodiscard]] const core::Manifest& manifest() const { return bundle.manifest(); }
    [[nodiscard]] const core::Tokenizer* reader() const { return tokenizer ? &*tokenizer : nullptr; }

    // What runs each stage by now; the text lives as long as the model.
    [[nodiscard]] const char* report() const;
};

// What a model's handle stands for until it is closed and its last call has ended.
struct ModelEntry {
    Stoppable running;
    std::mutex mutex;
    std::condition_variable idle;
    std::size_t calls = 0;
    bool closed = false;
    std::unique_ptr<OpenModel> model;
};

[[nodiscard]] higen_model* add_model(std::unique_ptr<OpenModel> model);

// Stop the generations of a model, wait for its calls, and free it. Inside of a call (a callback) nothing is waited for:
// the last call to end frees it. Nothing happens for a handle that is none.
void close_model(higen_model* handle);

// A call on an open model, which is not freed while this lives. Throws a request error for a null pointer,
// HIGEN_ERROR_CLOSED for a model that was closed.
class Call {
public:
    explicit Call(const higen_model* handle);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    [[nodiscard]] OpenModel& model() const { return *entry_->model; }
    [[nodiscard]] Stoppable& running() const { return entry_->running; }

private:
    std::shared_ptr<ModelEntry> entry_;
};

[[nodiscard]] higen_token* add_token();
void free_token(higen_token* handle);
// What a token stands for. Throws a request error for a null pointer, HIGEN_ERROR_CLOSED for one that was freed.
[[nodiscard]] std::shared_ptr<Stoppable> find_token(const higen_token* handle);

}  // namespace higen::c_api
