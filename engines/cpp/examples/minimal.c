/* The plain C interface: minimal MODEL "PROMPT" > video.rgb */
#include <stdio.h>

#include <higen/higen.h>

static int save(void* user, const higen_frames* frames) {
    const size_t size = (size_t)frames->count * (size_t)frames->width * (size_t)frames->height * 3;
    return fwrite(frames->rgb, 1, size, (FILE*)user) != size; /* not 0 stops the work */
}

int main(int argc, char** argv) {
    higen_model* model = NULL;
    higen_request request;
    higen_callbacks callbacks = HIGEN_CALLBACKS_INIT;
    higen_status status;
    if (argc != 3) return 2;

    status = higen_model_open(argv[1], NULL, &model);
    if (status == HIGEN_OK) status = higen_request_init(model, &request);
    if (status == HIGEN_OK) {
        request.prompt = argv[2];
        request.seed = 7;
        callbacks.user = stdout;
        callbacks.on_frames = save;
        fprintf(stderr, "%d frames of %dx%d\n", request.frames, request.width, request.height);
        status = higen_generate(model, &request, &callbacks);
    }
    if (status != HIGEN_OK) fprintf(stderr, "%s: %s\n", higen_status_name(status), higen_last_error());
    higen_model_close(model);
    return status == HIGEN_OK ? 0 : 1;
}
