#version 330 core
layout(location = 0) in vec3 position;
#ifdef NORMAL_LOC
layout(location = NORMAL_LOC) in vec3 normal;
#endif
#ifdef TEXCOORD_0_LOC
layout(location = TEXCOORD_0_LOC) in vec2 texcoord_0;
out vec2 uv_0;
#endif
#ifdef COLOR_0_LOC
layout(location = COLOR_0_LOC) in vec4 color_0;
out vec4 vertex_color;
#endif

uniform mat4 M;
uniform mat4 V;
uniform mat4 P;

invariant gl_Position;
out vec3 to_camera;
out vec3 view_normal;

void main()
{
    vec4 view_position = V * (M * vec4(position, 1.0));
    gl_Position = P * view_position;
    to_camera = P[3][3] == 0.0 ? -view_position.xyz : vec3(0.0, 0.0, 1.0);  // perspective or parallel
#ifdef NORMAL_LOC
    view_normal = mat3(V) * (mat3(M) * normal);
#endif
#ifdef TEXCOORD_0_LOC
    uv_0 = texcoord_0;
#endif
#ifdef COLOR_0_LOC
    vertex_color = color_0;
#endif
}
