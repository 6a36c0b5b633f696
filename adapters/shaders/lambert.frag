#version 330 core
// colour = base colour * (ambient + (1 - ambient) |n . c|), c the direction to the camera, which carries the light.
struct Material {
    vec4 base_color_factor;
#ifdef HAS_BASE_COLOR_TEX
    sampler2D base_color_texture;
#endif
};

uniform Material material;
uniform vec3 ambient_light;

in vec3 to_camera;
in vec3 view_normal;
#ifdef TEXCOORD_0_LOC
in vec2 uv_0;
#endif
#ifdef COLOR_0_LOC
in vec4 vertex_color;
#endif

out vec4 frag_color;

void main()
{
    vec4 base = material.base_color_factor;
#ifdef HAS_BASE_COLOR_TEX
    base *= texture(material.base_color_texture, uv_0);
#endif
#ifdef COLOR_0_LOC
    base *= vertex_color;
#endif
    float cosine = abs(dot(normalize(view_normal), normalize(to_camera)));
    frag_color = vec4(base.rgb * (ambient_light + (1.0 - ambient_light) * cosine), base.a);
}
