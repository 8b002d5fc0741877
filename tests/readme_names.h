// What README.md's example takes from the trainer around it.
static int64_t out_features = 8, in_features = 8, rows = 4;
static float m[64], v[64], out[32], inp[32], weight[64], dinp[32], dweight[64], dbias[8], dout[32], *bias = NULL;
static double loss = 1, lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, grad_scale = 1;
static int steps = 3;
static void zero_grad(void) { memset(dweight, 0, sizeof dweight); }
static void optimizer_step(void) { weight[0] += 1e-3f; }
